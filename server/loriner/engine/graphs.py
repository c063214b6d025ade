"""One CUDA graph for each number of rows: a step is replayed, not launched kernel by kernel.

Knows shapes and streams, no model. A graph is captured with padding alone, at start; the smallest
that holds a step is replayed. Invariant: what a graph reads and gives stands at fixed addresses,
and no graph's logits outlive the next replay.
"""

from __future__ import annotations

import gc
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SMALL = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
LARGE = (320, 384, 448, 512, 640, 768, 896, 1024)  # beyond, a step keeps the device busy longer
# than it takes to launch its kernels one by one, and padding would cost more than launches


class Variant(NamedTuple):
    """What a graph can run."""

    rows: int  # R
    has_lora: bool  # whether any row uses an adapter
    has_tiles: bool  # whether a sequence may have more than one row


def buckets(max_rows: int) -> list[int]:
    """Numbers of rows to capture, ascending; the last holds every step unless it is too large."""
    below = [rows for rows in (*SMALL, *LARGE) if rows < max_rows]
    return [*below, max_rows] if max_rows <= LARGE[-1] else below


def variants(max_rows: int, max_sequences: int) -> list[Variant]:
    """All graphs, the largest first: smaller ones then fit into its memory. Where no sequence has
    more than one row, there are as many rows as sequences at most."""
    sizes = buckets(max_rows)
    decode = sizes[: bisect_left(sizes, max_sequences) + 1]
    made = [
        Variant(rows, has_lora, has_tiles)
        for has_tiles, some in ((False, decode), (True, sizes[1:]))
        for rows in some
        for has_lora in (False, True)
    ]
    return sorted(made, key=lambda variant: -variant.rows)


class _Address:
    """Memory of a graph as torch sees it, without keeping it from the next graph."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous() and tensor.dtype is torch.float32
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage that frees device memory or page-locked memory would spoil a capture under way."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Graphs:
    """Captured steps. `run(variant)` computes one step from static tensors and gives its logits;
    `clear(variant)` fills those with padding."""

    def __init__(
        self,
        run: Callable[[Variant], Tensor],
        clear: Callable[[Variant], None],
        device: torch.device,
    ) -> None:
        self._run, self._clear, self._device = run, clear, device
        self._graphs: dict[Variant, tuple[Any, Tensor]] = {}

    def capture(self, wanted: Sequence[Variant]) -> None:
        """Run each variant once, so that every kernel is compiled and loaded, then capture it."""
        begin = time.monotonic()
        free_before, _ = torch.cuda.mem_get_info(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        pool = torch.cuda.graph_pool_handle()
        with no_collection():
            for done, variant in enumerate(wanted):
                self._graphs[variant] = self._capture(variant, stream, pool)
                if (done + 1) % 8 == 0 or done + 1 == len(wanted):
                    logger.info("CUDA graphs: %d of %d", done + 1, len(wanted))
        torch.cuda.empty_cache()
        free_after, _ = torch.cuda.mem_get_info(self._device)
        logger.info(
            "CUDA graphs captured in %.1f s, %.1f MiB",
            time.monotonic() - begin,
            (free_before - free_after) / (1 << 20),
        )

    def replay(self, variant: Variant) -> Tensor:
        """Run the step that was uploaded: logits [B, V], until the next replay."""
        graph, logits = self._graphs[variant]
        graph.replay()
        return logits

    def __contains__(self, variant: Variant) -> bool:
        return variant in self._graphs

    def _capture(self, variant: Variant, stream: Any, pool: Any) -> tuple[Any, Tensor]:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._clear(variant)
            self._run(variant)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may copy adapters and read files meanwhile
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                logits = self._run(variant)
            finally:
                graph.capture_end()
        kept = torch.as_tensor(_Address(logits), device=self._device)
        return graph, kept
