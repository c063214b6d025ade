"""Where a step's time goes: each kernel's launches and microseconds, as torch's profiler sees them.

Works on what a graph replays too. The profiler makes launches slower but not kernels, so the sum of
kernels beside the step's own time shows the gaps (or, with overlapping launches, the overlap).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from loriner.bench.timing import Stopwatch

HEAD = ("kernel", "launches", "us", "us each", "of the sum")
MAX_NAME = 72


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel (on a CPU, one torch operator) in one launch of a step."""

    name: str
    launches: float
    us: float


def kernel_times(watch: Stopwatch, launch: Callable[[], object], repeats: int) -> list[KernelTime]:
    """Of one `launch`, the longest first; means over `repeats`."""
    activity = torch.profiler.ProfilerActivity
    wanted = activity.CUDA if watch.on_gpu else activity.CPU
    launch()
    watch.wait()
    with torch.profiler.profile(activities=[wanted], acc_events=True) as profile:
        for _ in range(repeats):
            launch()
        watch.wait()
    found = []
    for event in profile.key_averages():
        us = event.self_device_time_total if watch.on_gpu else event.self_cpu_time_total
        if us > 0:
            found.append(KernelTime(event.key, event.count / repeats, us / repeats))
    return sorted(found, key=lambda kernel: -kernel.us)


def rows_of(times: Sequence[KernelTime]) -> list[tuple[str, ...]]:
    """Cells under HEAD, with the sum as the last row."""
    total = sum(kernel.us for kernel in times)
    rows = [
        (
            kernel.name[:MAX_NAME],
            f"{kernel.launches:.0f}",
            f"{kernel.us:.1f}",
            f"{kernel.us / kernel.launches:.2f}",
            f"{kernel.us / total:.1%}",
        )
        for kernel in times
    ]
    launches = sum(kernel.launches for kernel in times)
    return [*rows, ("sum", f"{launches:.0f}", f"{total:.1f}", "", "")]
