"""One variant of `bench cost`, trained and scored: a script, `python cost_case.py JOB OUT`.

All variants are answered and scored by the trainer's own code; a full fine-tuning is written out in
bf16 for that, as one would to keep it. Invariant: peak and time are of the training alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loriner.bench.dense_base import write_dense
from loriner.bench.full import FullModel, train_full
from loriner.model.sources import HfSource
from loriner.train.asking import ask
from loriner.train.base import Base, device_of, dtype_of, open_base
from loriner.train.data import load_prompts
from loriner.train.files import Settings
from loriner.train.graphs import Graphs
from loriner.train.lora import Lora
from loriner.train.prepare import Preparation, prepare
from loriner.train.progress import peak_memory
from loriner.train.qlora import Silent, turn
from loriner.train.scoring import scorer
from loriner.train.settings import JobConfig, RunConfig

FULL = "full"
ENDS = 10  # steps whose losses are averaged at the beginning and at the end


def main(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = RunConfig(
            base=Path(job["base"]),
            device=job["device"],
            dtype=job["dtype"],
            num_threads=job["threads"],
        )
        settings = JobConfig(out=Path(folder, "run"), **_typed(job["settings"]))
        preparation = prepare(Settings(run, (settings,)))
        train = _train_full if job["variant"] == FULL else _train_adapter
        base, lora, found = train(preparation, Path(folder))
        start = time.perf_counter()
        scores = _scores(base, lora, preparation, job)
        return {**found, **scores, "answer_s": time.perf_counter() - start}


def _typed(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "data": Path(settings["data"])}


def _train_adapter(
    preparation: Preparation, folder: Path
) -> tuple[Base, Lora | None, dict[str, Any]]:
    base = open_base(preparation.settings.run)
    (job,) = preparation.start(base)
    start = time.perf_counter()
    graphs = Graphs(base)
    while not job.is_done:
        turn(graphs, [job], Silent())
    losses = [record.loss for record in job.steps]
    found = _found(losses, time.perf_counter() - start, preparation, job.lora.num_parameters)
    return base, job.lora, found


def _train_full(preparation: Preparation, folder: Path) -> tuple[Base, Lora | None, dict[str, Any]]:
    run, (part,) = preparation.settings.run, preparation.jobs
    device = device_of(run)
    model = FullModel(run.base, device, dtype_of(run, device))
    start = time.perf_counter()
    losses = train_full(model, part.settings, part.data)
    count = sum(parameter.numel() for parameter in model.parameters())
    found = _found(losses, time.perf_counter() - start, preparation, count)
    source, target = HfSource(run.base), folder / "trained"
    write_dense(target, source.config, source, model.tensors(preparation.config))
    del model
    kept = RunConfig(base=target, device=run.device, dtype=run.dtype, num_threads=run.num_threads)
    return open_base(kept), None, found


def _found(
    losses: list[float], seconds: float, preparation: Preparation, trainable: int
) -> dict[str, Any]:
    (part,) = preparation.jobs
    return {
        "steps": len(losses),
        "rows": len(part.data.entries),
        "train_s": seconds,
        "peak_bytes": peak_memory(),
        "trainable": trainable,
        "parameters": preparation.config.num_parameters,
        "first_loss": _mean(losses[:ENDS]),
        "last_loss": _mean(losses[-ENDS:]),
    }


def _scores(
    base: Base, lora: Lora | None, preparation: Preparation, job: dict[str, Any]
) -> dict[str, Any]:
    prompts = load_prompts(Path(job["test"]))
    total, limit = len(prompts), job["max_rows"] or len(prompts)
    if limit < total:
        prompts = [prompts[i * total // limit] for i in range(limit)]
    tools = preparation.masker, preparation.tokenizer
    texts = ask(base, lora, prompts, *tools, max_rows=job["answer_rows"])
    wanted = [prompt.answer for prompt in prompts]
    right = {metric: sum(map(scorer(metric), texts, wanted)) for metric in job["metrics"]}
    return {"right": right, "asked": len(prompts)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    job_file, out_file = map(Path, sys.argv[1:])
    out_file.write_text(json.dumps(main(json.loads(job_file.read_text()))))
