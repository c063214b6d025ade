"""What a step gave, on its way from the device to the host, and what the host makes of it.

Knows no launches. Invariant: nothing is looked at before `event` has come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loriner.core import MAX_LOGPROBS
from loriner.engine.readings import Copied
from loriner.engine.sampler import Sampled, sample
from loriner.engine.step_input import Draw


class Results(NamedTuple):
    """A chooser's results on the host; `num_rows` is their B."""

    values: Tensor
    num_rows: int

    def ids(self, count: int) -> list[int]:
        made: list[int] = self.values[:count].tolist()
        return made

    def with_logprobs(self, row: int, token_id: int, count: int) -> Sampled:
        """The choice of `token_id`, and the `count` most likely."""
        rows = self.num_rows
        floats = self.values.view(torch.float32)
        start = 2 * rows + row * MAX_LOGPROBS
        ids = self.values[start : start + count].tolist()
        start += rows * MAX_LOGPROBS
        top = floats[start : start + count].tolist()
        return Sampled(token_id, float(floats[rows + row]), tuple(zip(ids, top, strict=True)))


@dataclass(frozen=True, slots=True)
class Copies:
    """A step's results on their way to the host."""

    event: Any  # has come when all is there; None where nothing runs beside the host
    draws: tuple[Draw, ...]
    results: Results
    with_logprobs: list[int]  # rows that ask for log-probabilities
    by_host: list[int]  # rows whose tokens the host chooses
    logits: Tensor  # [rows of `by_host`, V] f32
    prompts: Copied | None  # what is read of prompts
    eos_ids: tuple[int, ...]

    def result(self) -> list[Sampled]:
        if self.event is not None:
            self.event.synchronize()
        made = [Sampled(i if i >= 0 else None) for i in self.results.ids(len(self.draws))]
        for row in self.with_logprobs:
            token_id, count = made[row].token_id, self.draws[row].params.logprobs
            if token_id is not None and count is not None:
                made[row] = self.results.with_logprobs(row, token_id, count)
        for row, logits in zip(self.by_host, self.logits, strict=True):
            made[row] = sample(logits[None], [self.draws[row]], self.eos_ids)[0]
        return made
