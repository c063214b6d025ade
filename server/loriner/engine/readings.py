"""What a step tells of the rows of a prompt, and what the steps of one prompt add up to.

Knows hidden states and numbers of rows; no requests. Invariant: what is told of a row does not
depend on the rows beside it, nor on how a prompt is cut into steps, but for the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loriner.core import TokenLogprob
from loriner.engine.step_input import Reading
from loriner.model.transformer import Transformer

PIECE = 32  # rows of logits at a time: their memory is bounded, and their kernels are compiled


@dataclass(frozen=True, slots=True)
class HiddenSum:
    """The sum of some rows' last hidden states."""

    values: NDArray[np.float64]  # [H]

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.values).all())


class Score(NamedTuple):
    """What a row says of the token that follows it: natural logarithms, under the model's own
    distribution."""

    token_id: int
    logprob: float
    rank: int  # 1: the likeliest
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """Of some neighbouring rows of a prompt."""

    entries: list[Score]

    @property
    def finite(self) -> bool:
        return all(math.isfinite(entry.logprob) for entry in self.entries)


Read = HiddenSum | Scores  # what one step told of some rows of one prompt
LoraOf = Callable[[str, int], Any]  # generation, rows -> what `lm_head` needs for them


class Copied:
    """What was read, on its way to the host or there: for each reading one tensor, or four."""

    def __init__(self, readings: Seq[Reading], made: Seq[tuple[Tensor, ...]]) -> None:
        self._readings, self._made = readings, made

    def told(self) -> list[Read]:
        """Once the device has done what it was given."""
        pairs = zip(self._readings, self._made, strict=True)
        return [_told(reading, tensors) for reading, tensors in pairs]


class Reader:
    """Is shown a step's hidden states by the model, and reads `readings`. For one step; made before
    its kernels are launched."""

    def __init__(self, model: Transformer, readings: Seq[Reading], lora_of: LoraOf) -> None:
        self._model, self._readings = model, readings
        self._made: list[tuple[Tensor, ...]] = []
        sizes = {(one.generation, size) for one in readings for size in _sizes(one)}
        self._loras = {
            (generation, size): None if generation is None else lora_of(generation, size)
            for generation, size in sizes
        }

    def __call__(self, h: Tensor) -> None:
        """h [T, H], as the last norm gets it."""
        for one in self._readings:
            self._made.append((self._sum(h, one),) if one.targets is None else self._score(h, one))

    def copied(self) -> Copied:
        """Begin to copy what was read to the host; never waits."""
        copies = [tuple([_to_host(one) for one in tensors]) for tensors in self._made]
        return Copied(self._readings, copies)

    def _sum(self, h: Tensor, reading: Reading) -> Tensor:
        """[H] f64."""
        rows = torch.arange(reading.start, reading.end, dtype=torch.int32, device=h.device)
        return self._model.normed(h, rows).sum(0, dtype=torch.float64)

    def _score(self, h: Tensor, reading: Reading) -> tuple[Tensor, ...]:
        """Log-probabilities [n] f32 and ranks [n] of the targets; the likeliest ids [n, k] and
        their log-probabilities."""
        assert reading.targets is not None
        targets, pieces, start = to_device(reading.targets, h.device).long(), [], 0
        for size in _sizes(reading):
            first = reading.start + start
            rows = torch.arange(first, first + size, dtype=torch.int32, device=h.device)
            lora = self._loras[reading.generation, size]
            logits = self._model.lm_head.logits(self._model.normed(h, rows), lora)
            pieces.append(scores(logits, targets[start : start + size], reading.num_top))
            start += size
        return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def scores(logits: Tensor, targets: Tensor, num_top: int) -> tuple[Tensor, ...]:
    """logits [n, V] f32, targets [n] i64 -> `Reader._score`'s four of these rows."""
    total = logits.logsumexp(-1, keepdim=True)
    own = logits.gather(1, targets[:, None])
    ranks = (logits > own).sum(-1) + 1
    best, ids = logits.topk(min(num_top, logits.shape[1]))
    return (own - total).squeeze(1), ranks, ids, best - total


def to_device(values: NDArray[np.int32], device: torch.device) -> Tensor:
    """Never waits for the device."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _to_host(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


def _sizes(reading: Reading) -> list[int]:
    """Rows of logits that are made at a time."""
    if reading.targets is None:
        return []
    whole, rest = divmod(reading.end - reading.start, PIECE)
    return [PIECE] * whole + [rest] * (rest > 0)


def _told(reading: Reading, tensors: tuple[Tensor, ...]) -> Read:
    if reading.targets is None:
        return HiddenSum(tensors[0].numpy())
    columns = [reading.targets.tolist(), *(tensor.tolist() for tensor in tensors)]
    if not tensors:
        return Scores([])
    return Scores(
        [
            Score(token_id, logprob, rank, tuple(zip(ids, best, strict=True)))
            for token_id, logprob, rank, ids, best in zip(*columns, strict=True)
        ]
    )


class Embedding:
    """The mean of a prompt's last hidden states over its tokens, made length 1."""

    def __init__(self) -> None:
        self.num_read = 0
        self._sum: NDArray[np.float64] = np.zeros(0)

    def take(self, start: int, end: int, read: HiddenSum) -> None:
        """The prompt's tokens [start, end) are read. A prompt that lost its blocks starts again;
        what a step under way still tells of it then counts only where it continues."""
        if start == 0:
            self.num_read, self._sum = 0, np.zeros_like(read.values)
        if start == self.num_read:
            self.num_read, self._sum = end, self._sum + read.values

    def vector(self) -> bytes:
        """[H] f32, little-endian."""
        length = float(np.linalg.norm(self._sum)) or 1.0  # a mean's length is divided out
        return (self._sum / length).astype("<f4").tobytes()


class PromptLogprobs:
    """What a prompt's tokens were to the model, each after those before it."""

    def __init__(self, name: Callable[[int], str]) -> None:
        """`name`: a token's text alone."""
        self.num_read = 0
        self._name = name
        self._entries: list[TokenLogprob] = []

    def take(self, start: int, end: int, read: Scores) -> None:
        """As of `Embedding`."""
        if start == 0:
            self.num_read, self._entries = 0, []
        if start == self.num_read:
            self.num_read = end
            self._entries += [self._entry(score) for score in read.entries]

    def entries(self, first_id: int) -> tuple[TokenLogprob, ...]:
        """One for each token; before the first one, whose id is given, there was nothing."""
        return (TokenLogprob(first_id, math.nan, self._name(first_id)), *self._entries)

    def _entry(self, score: Score) -> TokenLogprob:
        name = self._name
        top = tuple(TokenLogprob(i, p, name(i), (), r) for r, (i, p) in enumerate(score.top, 1))
        return TokenLogprob(score.token_id, score.logprob, name(score.token_id), top, score.rank)
