"""What a step tells of the rows of a prompt, and what the steps of one prompt add up to.

Knows hidden states and numbers of rows; no requests. Invariant: what is told of a row does not
depend on the rows beside it, nor on how a prompt is cut into steps, but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loriner.engine.step_input import Reading
from loriner.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Read:
    """What one step told of some rows of one prompt."""

    hidden_sum: NDArray[np.float64]  # [H]

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.hidden_sum).all())


class Copied:
    """What was read, on its way to the host or there."""

    def __init__(self, sums: Seq[Tensor]) -> None:
        self._sums = sums

    def told(self) -> list[Read]:
        """Once the device has done what it was given."""
        return [Read(one.numpy()) for one in self._sums]


class Reader:
    """Is shown a step's hidden states by the model, and reads `readings`. For one step."""

    def __init__(self, model: Transformer, readings: Seq[Reading]) -> None:
        self._model, self._readings = model, readings
        self._sums: list[Tensor] = []

    def __call__(self, h: Tensor) -> None:
        """h [T, H], as the last norm gets it."""
        for start, end in self._readings:
            rows = torch.arange(start, end, dtype=torch.int32, device=h.device)
            self._sums.append(self._model.normed(h, rows).sum(0, dtype=torch.float64))

    def copied(self) -> Copied:
        """Begin to copy what was read to the host; never waits."""
        return Copied([_to_host(one) for one in self._sums])


class Embedding:
    """The mean of a prompt's last hidden states over its tokens, made length 1."""

    def __init__(self) -> None:
        self.num_read = 0
        self._sum: NDArray[np.float64] = np.zeros(0)

    def take(self, start: int, end: int, read: Read) -> None:
        """The prompt's tokens [start, end) are read. A prompt that lost its blocks starts again;
        what a step under way still tells of it then counts only where it continues."""
        if start == 0:
            self.num_read, self._sum = 0, np.zeros_like(read.hidden_sum)
        if start == self.num_read:
            self.num_read, self._sum = end, self._sum + read.hidden_sum

    def vector(self) -> bytes:
        """[H] f32, little-endian."""
        length = float(np.linalg.norm(self._sum)) or 1.0  # a mean's length is divided out
        return (self._sum / length).astype("<f4").tobytes()


def _to_host(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
