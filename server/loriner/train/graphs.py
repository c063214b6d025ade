"""Passes that learn, as CUDA graphs: forward, backward and the adapters' gradients in one replay.

A pass is padded to a size (`padding`). The first of a size runs eagerly, which readies libraries
and memory; the second is captured, and from then on a pass of that size and those adapters copies
its batch into the graph's and replays. Where nothing can be captured passes run eagerly. Invariant:
what a graph reads and writes stays at its address as long as the graph: its batch, and the weights
and gradients of its adapters.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loriner.train.base import Base
from loriner.train.lora import Lora
from loriner.train.padding import Sizes, padding
from loriner.train.passes import Batch, Share, by_share, learn, learn_batch

logger = logging.getLogger(__name__)

LIMIT = 24  # graphs
IDLE = 8 * LIMIT  # passes without a use, after which a graph makes room

Run = Callable[[], Tensor]
Record = Callable[[Run], Run]  # run -> what does the same again, faster, at the same addresses
Key = tuple[Sizes, tuple[tuple[Lora | None, bool], ...]]  # whether without noise


@dataclass(slots=True)
class _Graph:
    batch: Batch
    replay: Run
    used: int  # the pass that used it last


class Graphs:
    """`learn` as `passes.learn` has it. Its graphs live as long as it does."""

    def __init__(self, base: Base, record: Record | None = None, limit: int = LIMIT) -> None:
        """`record`: how to capture; CUDA's own where the base can be captured."""
        self._base, self._limit = base, limit
        self._record = record or (CudaRecord() if base.has_flash else None)
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()  # least recently used first
        self._seen: set[Key] = set()
        self.num_passes = self.num_replays = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def learn(self, shares: Sequence[Share]) -> list[Tensor]:
        """Each share's losses, one a learnt token; gradients are added onto the adapters'."""
        self.num_passes += 1
        if self._record is None:
            return learn(self._base, shares)
        fillings, sizes = padding([share.documents for share in shares])
        filled = [replace(s, padding=own) for s, own in zip(shares, fillings, strict=True)]
        batch = Batch.of(self._base, filled, sizes)
        users = tuple((share.lora, share.seed is None) for share in shares)
        graph = self._graph((sizes, users), batch, filled)
        if graph is None:
            return by_share(self._eager(batch, filled), shares)
        if graph.batch is not batch:
            graph.batch.copy(batch)
        self.num_replays += 1
        return by_share(graph.replay().clone(), shares)

    def _eager(self, batch: Batch, shares: Sequence[Share]) -> Tensor:
        """Once more without the graphs, if there is no memory beside them: until gradients are
        added, which takes none, nothing has changed."""
        try:
            return learn_batch(self._base, batch, shares)
        except torch.OutOfMemoryError as error:
            if not self._graphs:
                raise
            self._give_up(error)
        return learn_batch(self._base, batch, shares)

    def _give_up(self, error: Exception) -> None:
        logger.warning("Passes run without CUDA graphs, more slowly: %s", error)
        self._record = None
        self._graphs.clear()

    def _graph(self, key: Key, batch: Batch, shares: Sequence[Share]) -> _Graph | None:
        graph = self._graphs.get(key)
        if graph is None and key in self._seen and self._make_room():
            graph = self._captured(key, batch, shares)
        self._seen.add(key)
        if graph is not None:
            graph.used = self.num_passes
            self._graphs.move_to_end(key)
        return graph

    def _make_room(self) -> bool:
        """Whether there is room for one more; the least recently used goes if it is idle. One that
        is in use stays: of more sizes than there is room for, each would be captured anew."""
        if len(self._graphs) < self._limit:
            return True
        key, oldest = next(iter(self._graphs.items()))
        if self.num_passes - oldest.used < IDLE:
            return False
        del self._graphs[key]
        return True

    def _captured(self, key: Key, batch: Batch, shares: Sequence[Share]) -> _Graph | None:
        assert self._record is not None
        try:
            replay = self._record(lambda: learn_batch(self._base, batch, shares))
        except Exception as error:  # noqa: BLE001 - whatever stops a capture, eager passes go on
            self._give_up(error)
            return None
        self._graphs[key] = graph = _Graph(batch, replay, self.num_passes)
        return graph


class CudaRecord:
    """Captures into one pool of memory, as one graph is replayed at a time. Raises RuntimeError
    when what is left would not hold a pass beside it: evaluations and other sizes run eagerly."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._size = 0  # bytes

    def __call__(self, run: Run) -> Run:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                before = torch.cuda.memory_reserved()
                losses = run()
            self._size += torch.cuda.memory_reserved() - before
            if _bytes_left() < self._size:
                raise RuntimeError("there is no memory for both them and other passes.")
        except BaseException:
            torch.cuda.set_stream(stream)  # a capture that cannot be ended leaves its own
            torch.cuda.synchronize()
            raise

        def replay() -> Tensor:
            graph.replay()
            return losses

        return replay


def _bytes_left() -> int:
    """Of the device, or of this process's part of it."""
    free, total = torch.cuda.mem_get_info()
    part = int(torch.cuda.get_per_process_memory_fraction() * total)
    return min(free, part - torch.cuda.memory_reserved())
