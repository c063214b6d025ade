"""A device for the CPU: memory that is host memory, copies that run when the test says so, and a
reader that follows the seat table's pointers as kernels do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loriner.adapters.adapter import Adapter
from loriner.adapters.gpu_pool import DeviceSeats, Pairs, Ticket
from loriner.adapters.image import ALIGNMENT, ENTRY, ImageLayout, SeatImage, view
from loriner.adapters.pool import Layout, Placement

FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def layout_of(modules: Mapping[str, tuple[int, int]]) -> Layout:
    """Where a Llama's modules stand, as `model.transformer.layout` says it."""
    placed = {
        "lm_head": Placement("lm_head", 0),
        "model.embed_tokens": Placement("embed", 0),
    }
    num_layers = sum(name.endswith("q_proj") for name in modules)
    for i in range(num_layers):
        for group, names in FUSED.items():
            offset = 0
            for name in (f"model.layers.{i}.{n}" for n in names):
                placed[name] = Placement(f"{i}.{group}", offset)
                offset += modules[name][0]
    return placed


def tensors(image: SeatImage) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """((module, role), tensor as stored) of all there is."""
    for key, place in image.plan.places.items():
        yield key, view(image.bytes, place)


def slab(num_bytes: int) -> Tensor:
    """Bytes on the boundary that a device gives, poisoned."""
    data = torch.full((num_bytes + ALIGNMENT,), 0xFF, dtype=torch.uint8)
    start = -data.data_ptr() % ALIGNMENT
    return data[start : start + num_bytes]


class Launch:
    """A step under way; its event is the object itself."""

    def __init__(self) -> None:
        self.done = False


class FakeCopies:
    """Copies in order, each when its event has come and `run` is called."""

    def __init__(self) -> None:
        self.jobs: deque[tuple[Callable[[], Pairs], Any, Ticket]] = deque()
        self.num_copies = 0
        self.broken = False

    def start(self, pairs: Callable[[], Pairs], after: Any | None, ticket: Ticket) -> None:
        self.jobs.append((pairs, after, ticket))

    def run(self) -> None:
        while self.jobs and (self.jobs[0][1] is None or self.jobs[0][1].done):
            pairs, _, ticket = self.jobs.popleft()
            if self.broken:
                ticket.error = RuntimeError("out of order")
                continue
            for target, source in pairs():
                target.copy_(source)
                self.num_copies += 1
            ticket.done = True

    def close(self) -> None:
        pass


def fake_seats(
    layout: ImageLayout, pool_bytes: int, max_seats: int
) -> tuple[DeviceSeats, FakeCopies, Tensor]:
    """(seats, their copies, their memory)."""
    shape = (max_seats, len(layout.groups), ENTRY.itemsize)
    memory, copies = slab(pool_bytes), FakeCopies()
    table, rows = (torch.zeros(shape, dtype=torch.uint8) for _ in range(2))

    def arrange(row: Tensor) -> None:
        Reader(memory, row, layout).tile()

    return DeviceSeats(layout, memory, table, rows, copies, arrange), copies, memory


def tiled(b: Tensor) -> Tensor:
    """B [n, r] in tiles, [n / 16, r / 4, 8, 2, 2, 2], as a view.

    Output n and rank r stand at [n // 16, r // 4, n % 8, r // 2 % 2, n // 8 % 2, r % 2]: what a
    lane of the matrix instruction wants of 16 outputs and 16 ranks is then 16 neighbouring bytes.
    """
    n, rank = b.shape
    return b.view(n // 16, 2, 8, rank // 4, 2, 2).permute(0, 3, 2, 4, 1, 5)


class Reader:
    """Follows the pointers of one row of the seat table into `memory`."""

    def __init__(
        self, memory: Tensor, row: Tensor, layout: ImageLayout, *, aligned: bool = True
    ) -> None:
        self._memory, self._layout = memory, layout
        self._aligned = aligned  # whether addresses are the device's own
        self._entries = row.numpy().view(ENTRY).reshape(-1)

    def ranks(self, group: str) -> list[int]:
        return [int(end) for end in self._entry(group)["rank_end"]]

    def linear(self, group: str, x: Tensor, num_outs: list[int]) -> Tensor:
        """sum of scale * (b (a x) + bias) by slice, in float64; zeros where nothing is adapted."""
        entry = self._entry(group)
        ends = self.ranks(group)
        if ends[-1] == 0:
            assert not any(bytes(entry.tobytes())), "an absent group is all zero"
            return torch.zeros(sum(num_outs), dtype=torch.float64)
        a = self._read(entry["a"], (ends[-1], len(x)), torch.bfloat16)
        slices = []
        for i, num_out in enumerate(num_outs):
            start = ends[i - 1] if i else 0
            if ends[i] == start:
                slices.append(torch.zeros(num_out, dtype=torch.float64))
                continue
            b = self._read_b(entry, i, (num_out, ends[i] - start))
            y = b.double() @ (a[start : ends[i]].double() @ x.double())
            if entry["bias"][i]:
                y += self._read(entry["bias"][i], (num_out,), torch.float32).double()
            slices.append(float(entry["scale"][i]) * y)
        return torch.cat(slices)

    def embedding(self, token: int, vocab: int, hidden: int) -> Tensor:
        entry, rank = self._entry("embed"), self.ranks("embed")[0]
        a = self._read(entry["a"], (vocab, rank), torch.bfloat16)
        b = self._read_b(entry, 0, (hidden, rank))
        return float(entry["scale"][0]) * (b.double() @ a[token].double())

    def tile(self) -> None:
        """Put each B that is to be in tiles into them."""
        for entry in self._entries:
            ranks = np.diff(entry["rank_end"], prepend=0)
            for i in (i for i in range(3) if entry["tiled"] >> i & 1):
                shape = int(entry["outputs"][i]), int(ranks[i])
                stored = self._read(entry["b"][i], shape, torch.bfloat16)
                stored.view(-1).copy_(tiled(stored.clone()).reshape(-1))

    def _entry(self, group: str) -> Any:
        return self._entries[self._layout.groups.index(group)]

    def _read_b(self, entry: Any, index: int, shape: tuple[int, int]) -> Tensor:
        stored = self._read(entry["b"][index], shape, torch.bfloat16)
        if not entry["tiled"] >> index & 1:
            return stored
        b = torch.empty_like(stored)
        tiled(b).copy_(stored.view(tiled(b).shape))
        return b

    def _read(self, address: np.uint64, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        offset = int(address) - self._memory.data_ptr()
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        assert int(address) % ALIGNMENT == 0 or not self._aligned
        assert 0 <= offset <= len(self._memory) - num_bytes
        return self._memory[offset : offset + num_bytes].view(dtype).view(shape)


def expected(adapter: Adapter, modules: list[str], x: Tensor, num_outs: list[int]) -> Tensor:
    """The equation of `LoraWeight` over the slices of a fused linear, on bf16 weights."""
    slices = []
    for name, num_out in zip(modules, num_outs, strict=True):
        w = adapter.modules.get(name)
        if w is None:
            slices.append(torch.zeros(num_out, dtype=torch.float64))
            continue
        y = w.b.bfloat16().double() @ (w.a.bfloat16().double() @ x.double())
        y = y if w.bias is None else y + w.bias.float().double()
        slices.append(w.scaling * y)
    return torch.cat(slices)
