"""The host tier's memory: one stretch taken at start, page-locked where a GPU reads from it.

Knows bytes only; safe for several threads. Invariant: two buffers never overlap. What finds no room
gets ordinary memory: slower to copy from, and never refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from loriner.adapters.arena import Allocation, Arena

PAGE_BYTES = 64 << 10


class HostBuffer:
    """Bytes on the host, and how to give them back."""

    __slots__ = ("_free", "bytes")

    def __init__(self, data: Tensor, free: Callable[[], None] | None = None) -> None:
        self.bytes = data  # uint8
        self._free = free

    def free(self) -> None:
        free, self._free = self._free, None
        if free is not None:
            free()


Allocate = Callable[[int], HostBuffer]  # bytes -> a buffer of at least so many


def pageable(num_bytes: int) -> HostBuffer:
    """A buffer of its own."""
    return HostBuffer(torch.empty(num_bytes, dtype=torch.uint8))


class HostArena:
    """Buffers in `data`, uint8."""

    def __init__(self, data: Tensor, page_bytes: int = PAGE_BYTES) -> None:
        self._data, self._page = data, page_bytes
        self._arena = Arena(data.nbytes // page_bytes)
        self._lock = threading.Lock()
        self.num_misses = 0  # buffers that found no room

    @property
    def budget_bytes(self) -> int:
        return self._arena.num_pages * self._page

    def allocate(self, num_bytes: int) -> HostBuffer:
        """A buffer of at least `num_bytes`."""
        chunks = [-(-num_bytes // self._page)]
        with self._lock:
            fits = self._arena.can_allocate(chunks)
            self.num_misses += not fits
            allocation = self._arena.allocate(chunks) if fits else None
        if allocation is None:
            return pageable(num_bytes)
        start = allocation.starts[0] * self._page
        data = self._data[start : start + num_bytes]
        return HostBuffer(data, lambda: self._free(allocation))

    def check_integrity(self) -> None:
        with self._lock:
            self._arena.check_integrity()

    def _free(self, allocation: Allocation) -> None:
        with self._lock:
            self._arena.free(allocation)
