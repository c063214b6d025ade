"""A runner, on any device, whose every choice is noted and whose answers can be given.

A request is known by its seed. Where `answers` has tokens for it, the engine goes on with those
whatever the model would choose, so that one token that differs does not make the rest differ.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loriner.core import SamplingParams
from loriner.engine.cpu_runner import Ended
from loriner.engine.sampler import Sampled
from loriner.engine.step_input import Draw, StepInput
from tests.engines import RecordingRunner


class Choice(NamedTuple):
    """What the model would choose at one place."""

    token_id: int
    margin: float  # between its logits of the best token and the second
    logits: Tensor | None  # [V], of the first places


Choices = dict[tuple[int, int], Choice]  # (seed, place in the output) -> choice


class ForcedRunner:
    """`runner` with every token chosen on the host, while `notes` is a dictionary."""

    def __init__(self, runner: Any, num_kept: int) -> None:
        self.runner, self.num_kept = runner, num_kept
        self.notes: Choices | None = None
        self.answers: dict[int, Seq[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def needs_host(self, params: SamplingParams) -> bool:
        return self.notes is not None or bool(self.runner.needs_host(params))

    def launch(self, step: StepInput) -> Any:
        pending = self.runner.launch(step)
        if self.notes is None:
            return pending
        if isinstance(self.runner, RecordingRunner):
            return Ended(self.note(step.draws, self.runner.last_logits))
        pending.result()  # has come
        return Ended(self.note(step.draws, pending._known().logits))

    def note(self, draws: Seq[Draw], logits: Tensor) -> list[Sampled]:
        assert self.notes is not None and torch.isfinite(logits).all()
        best = logits.topk(2, dim=-1)
        made = []
        for row, draw in enumerate(draws):
            (first, second), token_id = best.values[row].tolist(), int(best.indices[row, 0])
            kept = logits[row].clone() if draw.place < self.num_kept else None
            self.notes[draw.seed, draw.place] = Choice(token_id, first - second, kept)
            given = self.answers.get(draw.seed)
            made.append(Sampled(token_id if given is None else given[draw.place]))
        return made
