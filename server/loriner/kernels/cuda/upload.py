"""One tensor of a device, filled again and again from the host without waiting for the device.

Knows no contents. Invariant: a buffer on the host is written again only when its copy is over.
"""

from __future__ import annotations

import torch

_RING = 3  # copies that can be on their way


class Upload:
    """`begin`, fill `buffers[turn]`, `send`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.buffers = [torch.zeros(shape, dtype=dtype).pin_memory() for _ in range(_RING)]
        self._copied = [torch.cuda.Event() for _ in range(_RING)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def begin(self) -> int:
        """The turn of the buffer to fill."""
        self._turn = (self._turn + 1) % _RING
        self._copied[self._turn].synchronize()  # of three uploads ago: over long since
        return self._turn

    def send(self, count: int) -> None:
        """The first `count` rows of the buffer that was begun, on the current stream."""
        self.tensor[:count].copy_(self.buffers[self._turn][:count], non_blocking=True)
        self._copied[self._turn].record()
