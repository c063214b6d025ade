"""Medians of what runs on a device: events on a GPU, a clock on a CPU; limits of the card.

Knows torch, and of ours how to capture. `replayable` is how everything is timed on a GPU: launches
captured once and replayed, so that the host costs nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from loriner.engine.graphs import no_collection

GIB = 1 << 30
Launch = Callable[[], object]


class Stopwatch:
    """Times launches on one device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device is idle."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def median_ms(self, launch: Launch, *, repeats: int = 20, warmup: int = 3) -> float:
        """Median milliseconds of one launch."""
        for _ in range(warmup):
            launch()
        self.wait()
        return statistics.median(self._times(launch, repeats))

    def each_us(self, launches: Sequence[Launch], *, repeats: int = 20) -> float:
        """Median microseconds of one of `launches`, run one after another in one replay."""
        whole = self.replayable(launches)
        return self.median_ms(whole, repeats=repeats) * 1e3 / len(launches)

    def replayable(self, launches: Sequence[Launch]) -> Launch:
        """All of `launches`, captured in a graph where there are graphs."""

        def run() -> None:
            for launch in launches:
                launch()

        if not self.on_gpu:
            return run
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            run()  # whatever is allocated or compiled on the first call is there before the capture
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with no_collection(), torch.cuda.graph(graph):
            run()
        return graph.replay

    def _times(self, launch: Launch, repeats: int) -> list[float]:
        if not self.on_gpu:
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                launch()
                times.append(1e3 * (time.perf_counter() - start))
            return times
        events: list[Any] = [torch.cuda.Event(enable_timing=True)]  # type: ignore[no-untyped-call]
        events[0].record()
        for _ in range(repeats):
            launch()
            events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            events[-1].record()
        self.wait()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def read_bandwidth(watch: Stopwatch, num_bytes: int | None = None) -> float:
    """Bytes a second that torch.sum reads, over 4 GiB (64 MiB on a CPU)."""
    num_bytes = num_bytes or (4 * GIB if watch.on_gpu else GIB // 16)
    values = torch.zeros(num_bytes // 4, dtype=torch.float32, device=watch.device)
    return num_bytes / (watch.median_ms(values.sum) / 1e3)


def matmul_rate(watch: Stopwatch, size: int | None = None) -> float:
    """FLOP a second of a bf16 matmul of 8192^3 (f32 of 512^3 on a CPU)."""
    size = size or (8192 if watch.on_gpu else 512)
    dtype = torch.bfloat16 if watch.on_gpu else torch.float32
    a, b = (torch.randn(size, size, dtype=dtype, device=watch.device) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=watch.device)
    milliseconds = watch.median_ms(lambda: torch.mm(a, b, out=out))
    return 2 * size**3 / (milliseconds / 1e3)
