"""How much of a device a run takes: it computes in turns, and rests after each, so that whoever
shares the device gets it in between.

Knows neither model nor job. Invariant: over any number of turns the share of the time computed is
`duty`, and a run with all of the device is neither timed nor held up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Pace:
    """Of one base. `turn` frames what is computed at a stretch; the shorter, the less others
    wait."""

    def __init__(
        self,
        device: torch.device,
        duty: float = 1.0,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`clock` and `sleep` are seconds."""
        self._device, self._duty = device, duty
        self._clock, self._sleep = clock, sleep

    @property
    def is_shared(self) -> bool:
        return self._duty < 1

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Rest in proportion to what the block took, once the device is through with it."""
        if not self.is_shared:
            yield
            return
        start = self._clock()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._sleep((self._clock() - start) * (1 / self._duty - 1))
