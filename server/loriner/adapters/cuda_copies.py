"""Copies to a CUDA device on a stream and a thread of their own, and the memory they go between.

Knows bytes and events, nothing of adapters. Invariant: the caller of `start` never waits, for the
device or for a driver's lock; a ticket is done only when its bytes are on the device.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from loriner.adapters.gpu_pool import Arrange, DeviceSeats, Pairs, Ticket
from loriner.adapters.host import HostArena
from loriner.adapters.image import ENTRY, ImageLayout
from loriner.errors import ConfigError

_TOUCH_BYTES = 64 << 20  # a thread's share when fresh memory is touched

_Job = tuple[Callable[[], Pairs], Any, Ticket]


class CudaCopies:
    """The copy stream of one device. `on_done` runs on the thread after each copy."""

    def __init__(self, device: torch.device, on_done: Callable[[], None]) -> None:
        self._device, self._on_done = device, on_done
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="adapter-copies", daemon=True)
        self._thread.start()

    def start(self, pairs: Callable[[], Pairs], after: Any | None, ticket: Ticket) -> None:
        """`after` is a torch.cuda.Event, recorded already."""
        self._jobs.put((pairs, after, ticket))

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        torch.cuda.set_device(self._device.index or 0)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        while (job := self._jobs.get()) is not None:
            pairs, after, ticket = job
            try:
                with torch.cuda.stream(stream), torch.inference_mode():
                    if after is not None:
                        stream.wait_event(after)
                    for target, source in pairs():
                        target.copy_(source, non_blocking=True)
                    arrived.record(stream)
                arrived.synchronize()
                ticket.done = True
            except Exception as error:  # noqa: BLE001  reported where the seat is asked for
                ticket.error = error
            self._on_done()


def pinned(num_bytes: int) -> Tensor:
    """Page-locked bytes on the host, in huge pages where the kernel has them.

    For the start of a process: page-locking takes a driver's lock, which would hold up launches.
    Raises ConfigError when the system refuses.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(memory, dtype=torch.uint8)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        list(threads.map(Tensor.zero_, torch.split(data, _TOUCH_BYTES)))
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = int(cudart.cudaHostRegister(data.data_ptr(), num_bytes, 0))
    if status != 0:
        raise ConfigError(f"{num_bytes} bytes cannot be page-locked (CUDA {status}): host_bytes.")
    weakref.finalize(memory, cudart.cudaHostUnregister, data.data_ptr())
    return data


def cuda_seats(
    layout: ImageLayout,
    pool_bytes: int,
    max_seats: int,
    on_done: Callable[[], None],
    device: torch.device,
    arrange: Arrange,
) -> DeviceSeats:
    """Seats on `device`. `on_done` wakes the engine when a copy has arrived."""
    shape = (max_seats, len(layout.groups), ENTRY.itemsize)
    slab = torch.empty(pool_bytes, dtype=torch.uint8, device=device)
    table = torch.zeros(shape, dtype=torch.uint8, device=device)
    rows = pinned(table.nbytes).view(shape)
    arrange(table[0])  # nothing; but a kernel's first launch may load it, and wait for the device
    torch.cuda.synchronize(device)
    return DeviceSeats(layout, slab, table, rows, CudaCopies(device, on_done), arrange)


def pinned_host(num_bytes: int) -> HostArena:
    """The host tier's memory."""
    return HostArena(pinned(num_bytes))
