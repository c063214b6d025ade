"""The training loop: one resident NF4 base, one or many adapters.

A turn is one forward and backward that all jobs share (`passes.py`); a job whose passes are through
takes its optimiser step (`job.py`). Knows no files but checkpoints, and prints nothing: `Watcher`
is told. Invariant: what a job learns does not depend on whom it shares its turns with, up to
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from loriner.train.base import Base
from loriner.train.checkpoints import save_checkpoint
from loriner.train.graphs import Graphs
from loriner.train.job import EvalRecord, Job, StepRecord


class Watcher(Protocol):
    """Who wants to know how it goes, and may ask it to stop after the turn."""

    @property
    def wants_stop(self) -> bool: ...

    def on_step(self, job: Job, record: StepRecord) -> None: ...

    def on_eval(self, job: Job, record: EvalRecord) -> None: ...


@dataclass(slots=True)
class Silent:
    """Tells nobody, and never stops by itself."""

    wants_stop: bool = False

    def on_step(self, job: Job, record: StepRecord) -> None: ...

    def on_eval(self, job: Job, record: EvalRecord) -> None: ...


def train(base: Base, jobs: Sequence[Job], watcher: Watcher) -> bool:
    """Train all `jobs` to their end. False when it was stopped: every job then has a checkpoint of
    its last whole step. Raises TrainError when a loss or gradient is not finite."""
    graphs = Graphs(base)
    evaluate_due(base, jobs, watcher)  # at step 0 B is zero, so this is the base's own loss
    while running := [job for job in jobs if not job.is_done]:
        if watcher.wants_stop:
            for job in running:
                job.abandon_step()
                save_checkpoint(job, base)
            return False
        with base.pace.turn():
            stepped = turn(graphs, running, watcher)
        evaluate_due(base, stepped, watcher)
        for job in stepped:
            if job.is_save_due():
                save_checkpoint(job, base)
    return True


def turn(graphs: Graphs, jobs: Sequence[Job], watcher: Watcher) -> list[Job]:
    """One pass of every job, and an optimiser step of those that it completes."""
    losses = graphs.learn([job.next_share() for job in jobs])
    for job, own in zip(jobs, losses, strict=True):
        job.note(own)
    stepped = [job for job in jobs if job.is_step_complete]
    for job in stepped:
        watcher.on_step(job, job.advance())
    return stepped


def evaluate_due(base: Base, jobs: Sequence[Job], watcher: Watcher) -> None:
    for job in jobs:
        if job.is_eval_due():
            watcher.on_eval(job, job.evaluate(base))
