"""Our trainer as one case of `bench train`: a script, `python own_trainer.py JOB OUT`."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from loriner.bench.random_base import RandomBase
from loriner.train.base import Base
from loriner.train.data import DataSet, Entry, Prompt
from loriner.train.graphs import Graphs
from loriner.train.job import Job
from loriner.train.masks import Document
from loriner.train.progress import peak_memory
from loriner.train.qlora import Silent, turn
from loriner.train.settings import JobConfig

WARM_UP = 2  # steps


def main(job: dict[str, Any]) -> dict[str, Any]:
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    on_gpu = job["device"] == "cuda"
    base = Base(
        RandomBase(job["shape"], job["device"], seed=job["seed"]),
        job["config"],
        device=torch.device(job["device"]),
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        gradient_checkpointing=job["checkpointing"],
    )
    with tempfile.TemporaryDirectory() as folder:
        jobs = [make_job(base, job, index, Path(folder)) for index in range(job["jobs"])]
        loaded = torch.cuda.memory_allocated() if on_gpu else peak_memory()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        graphs, times, losses = Graphs(base), [], []
        for _ in range(job["steps"] + WARM_UP):
            start = time.perf_counter()
            turn(graphs, jobs, Silent())
            losses.append(jobs[0].steps[-1].loss)  # its value is there, so the step is over
            times.append(time.perf_counter() - start)
    return {
        "jobs": job["jobs"],
        "tokens_per_step": job["jobs"] * job["batch"] * job["length"],
        "step_s": times[WARM_UP:],
        "losses": losses,
        "loaded_bytes": loaded,
        "peak_bytes": peak_memory(),
    }


def make_job(base: Base, job: dict[str, Any], index: int, folder: Path) -> Job:
    """All linears, paged 8-bit AdamW, rows of random tokens of which all are learnt."""
    settings = JobConfig(
        name=f"job-{index}",
        data=Path("random"),
        out=folder,
        rank=job["rank"],
        alpha=16,
        batch=job["batch"],
        max_length=job["length"],
        steps=10**6,
        schedule="constant",
        warmup=0,
        optimizer="paged_adamw_8bit",
        seed=index,
    )
    rows = random_rows(base.config.vocab_size, job["length"], 64, index)
    learnt = (False, *[True] * (job["length"] - 1))
    prompt = Prompt((), "", "")
    entries = tuple(Entry(prompt, (Document(tuple(row), learnt),), 0) for row in rows)
    return Job(settings, base, DataSet(Path("random"), "", entries, ()), None)


def random_rows(vocab: int, length: int, count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(vocab) for _ in range(length)] for _ in range(count)]


if __name__ == "__main__":
    job_file, out_file = map(Path, sys.argv[1:])
    out_file.write_text(json.dumps(main(json.loads(job_file.read_text()))))
