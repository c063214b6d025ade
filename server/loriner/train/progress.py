"""What a run shows and writes while it runs: a bar for each job, and OUT/metrics.jsonl.

The first Ctrl-C or SIGTERM asks the loop to stop after its turn, a second one ends it at once.
Invariant: the metrics file holds each step of the run once, also after it was resumed.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loriner.train.job import EvalRecord, Job, StepRecord

METRICS = "metrics.jsonl"
GIB = 1 << 30
SIGNALS = (signal.SIGINT, signal.SIGTERM)
LINES = 10  # in a run, where there is no terminal to draw on


class Screen:
    """A `Watcher`; use it in a `with` block."""

    def __init__(self, jobs: Sequence[Job], console: Console) -> None:
        self.wants_stop = False
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks = {
            id(job): self._progress.add_task(
                job.settings.name, total=job.num_steps, completed=job.step, figures=""
            )
            for job in jobs
        }
        for job in jobs:
            rewrite_metrics(job)

    def __enter__(self) -> Screen:
        self._before = {number: signal.signal(number, self._interrupt) for number in SIGNALS}
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step(self, job: Job, record: StepRecord) -> None:
        speed, memory = record.num_tokens / record.seconds, peak_memory()
        append_metrics(
            job, _line(record) | {"tokens_per_s": round(speed, 1), "memory_bytes": memory}
        )
        figures = (
            f"loss {record.loss:.4f}  lr {record.learning_rate:.2e}  "
            f"{speed:.0f} tokens/s  {memory / GIB:.2f} GiB"
        )
        self._progress.update(self._tasks[id(job)], completed=record.step, figures=figures)
        every = max(1, job.num_steps // LINES)
        if not self._console.is_terminal and (record.step % every == 0 or job.is_done):
            self._say(f"{job.settings.name}: step {record.step}/{job.num_steps}  {figures}")

    def on_eval(self, job: Job, record: EvalRecord) -> None:
        append_metrics(job, _line(record))
        what = f"step {record.step}" if record.step else "the base"
        self._say(f"{job.settings.name}: held-out loss {record.eval_loss:.4f} ({what})")
        if job.stopped_early:
            self._say(f"{job.settings.name}: stopped early, nothing gained since the best one")

    def _say(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)

    def _interrupt(self, number: int, frame: types.FrameType | None) -> None:
        if self.wants_stop:
            raise KeyboardInterrupt
        self.wants_stop = True
        self._say("Stopping after this pass and saving; once more to leave at once.")


def _line(record: StepRecord | EvalRecord) -> dict[str, Any]:
    """`at`: seconds since 1970."""
    event = "step" if isinstance(record, StepRecord) else "eval"
    return {"event": event, "at": round(time.time(), 3), **asdict(record)}


def append_metrics(job: Job, record: dict[str, Any]) -> None:
    with (job.settings.folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def rewrite_metrics(job: Job) -> None:
    """The file as the job's history has it: empty, or up to the step that it resumes from."""
    job.settings.folder.mkdir(parents=True, exist_ok=True)
    written = {(line["event"], line["step"]): line for line in read_metrics(job.settings.folder)}
    lines = [*map(_line, job.steps), *map(_line, job.evals)]
    lines = [written.get((line["event"], line["step"]), line) for line in lines]
    lines.sort(key=lambda line: line["step"])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (job.settings.folder / METRICS).write_text(text, encoding="utf-8")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records so far; none where there is no file."""
    path = folder / METRICS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def peak_memory() -> int:
    """Bytes: the GPU's peak where there is one, else this process's."""
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return peak
    return resident_peak()


def resident_peak() -> int:
    """Bytes of this process, at most so far. Where the kernel tells it, VmHWM: getrusage's peak is
    that of whoever started this one, too."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
