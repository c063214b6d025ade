"""Random weights and adapters on the GPU, what float64 makes of them, and kernels in graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from loriner.adapters.image import can_tile
from loriner.kernels.cuda.seats import SeatLora
from loriner.kernels.operands import NestedScales, Nf4
from loriner.model.nf4 import dynamic_map, nf4_code
from tests.adapters.fake_device import tiled

EXACT_ROWS = 256  # up to here a row does not depend on the others in its step, bit for bit
ENTRY_BYTES = 96
POISON = float("nan")


def random_nf4(outputs: int, inputs: int, *, nested: bool, device: str = "cuda") -> Nf4:
    blocks = outputs * inputs // 64
    packed = torch.randint(0, 256, (outputs * inputs // 2,), device=device, dtype=torch.uint8)
    if not nested:
        scales = torch.rand(blocks, device=device) * 0.05 + 0.01
        return Nf4(packed, scales, nf4_code().to(device), (outputs, inputs))
    index = torch.randint(0, 256, (blocks,), device=device, dtype=torch.uint8)
    outer = torch.rand(-(-blocks // 256), device=device) * 0.01 + 0.01
    absmax = NestedScales(index, outer, dynamic_map().to(device), 0.05)
    return Nf4(packed, absmax, nf4_code().to(device), (outputs, inputs))


def dense(weight: Nf4) -> Tensor:
    """[N, K] f64."""
    nibbles = torch.stack((weight.packed >> 4, weight.packed & 15), dim=1).view(weight.shape)
    scales = weight.expanded().view(weight.shape[0], -1).repeat_interleave(64, dim=1)
    return weight.code.double()[nibbles.long()] * scales.double()


def error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; not a number where anything was not written."""
    return float((found.double() - expected).norm() / expected.norm())


def acted(both: Tensor, act: str = "silu") -> Tensor:
    """act(gate) * up of gate and up [M, 2N]: [M, N]."""
    gate, up = both.chunk(2, dim=1)
    return (silu(gate) if act == "silu" else gelu(gate, approximate="tanh")) * up


@contextmanager
def poisoned() -> Iterator[None]:
    """Whatever is allocated holds no numbers until it is written."""
    plain = torch.empty

    def empty(*args: Any, **options: Any) -> Tensor:
        made = plain(*args, **options)
        return made.fill_(POISON if made.is_floating_point() else 123)

    with patch.object(torch, "empty", empty):
        yield


def alone_and_replayed(run: Callable[[], Tensor], x: Tensor) -> Iterator[Tensor]:
    """What `run` gives for the rows `x`, all that it allocates poisoned; then from a graph, where
    one kernel may begin before the one ahead has ended, for other rows in their place, drawn anew
    from the same spread."""
    with poisoned():
        y = run()
    yield y
    graph = torch.cuda.CUDAGraph()
    gc.disable()  # garbage that frees memory would spoil the capture
    try:
        with torch.cuda.graph(graph):
            y = run()
    finally:
        gc.enable()
    x.normal_(std=float(x.float().square().mean().sqrt()))
    y.fill_(POISON)
    graph.replay()
    yield y


class Seats:
    """A seat table with random adapters in one fused linear of `num_groups`."""

    def __init__(self, num_seats: int, num_groups: int = 1) -> None:
        self.table = torch.zeros(num_seats, num_groups, ENTRY_BYTES, dtype=torch.uint8)
        self.weights: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor, float]]] = {}
        self.keep: list[Tensor] = []

    def put(
        self, seat: int, group: int, inputs: int, sizes: list[int], ranks: list[int], *, bias: bool
    ) -> None:
        """One adapter; slice i has `sizes[i]` outputs and rank `ranks[i]` (0: not adapted)."""
        entry = self.table[seat, group]
        a = torch.randn(sum(ranks), inputs, device="cuda").bfloat16()
        self.keep.append(a)
        entry[0:8].view(torch.int64)[0] = a.data_ptr()
        slices, end = [], 0
        for i in range(3):
            rank = ranks[i] if i < len(ranks) else 0
            if rank:
                b = (torch.randn(sizes[i], rank, device="cuda") / 8).bfloat16()
                stored = tiled(b).contiguous() if can_tile(*b.shape) else b
                entry[80:84].view(torch.int32)[0] |= can_tile(*b.shape) << i
                entry[84 + 4 * i : 88 + 4 * i].view(torch.int32)[0] = sizes[i]
                offset = torch.randn(sizes[i], device="cuda") if bias else torch.zeros(sizes[i])
                scale = 0.5 + i
                self.keep += [stored, offset]
                entry[8 + 8 * i : 16 + 8 * i].view(torch.int64)[0] = stored.data_ptr()
                if bias:
                    entry[32 + 8 * i : 40 + 8 * i].view(torch.int64)[0] = offset.data_ptr()
                entry[56 + 4 * i : 60 + 4 * i].view(torch.float32)[0] = scale
                slices.append((a[end : end + rank], b, offset, scale))
            else:
                size = sizes[i] if i < len(sizes) else 0
                slices.append((a[:0], torch.zeros(size, 0), torch.zeros(size), 0.0))
            end += rank
            entry[68 + 4 * i : 72 + 4 * i].view(torch.int32)[0] = end
        self.weights[seat, group] = slices

    def expected(self, x: Tensor, seats: list[int], group: int, outputs: int) -> Tensor:
        """What the adapters add to rows x [M, K] f64: [M, N] f64."""
        made = torch.zeros(len(x), outputs, dtype=torch.float64, device="cuda")
        used = torch.tensor(seats)
        for seat in set(seats):
            rows = (used == seat).nonzero()[:, 0].cuda()
            parts = []
            for a, b, offset, scale in self.weights.get((seat, group), []):
                t = x[rows] @ a.double().t()
                parts.append(scale * (t @ b.double().cuda().t() + offset.double().cuda()))
            if parts:
                made[rows] = torch.cat(parts, dim=1)
        return made


def items_of(seats: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """row_seat, items and their number, on the GPU, with room for one item a row."""
    items, start = [], 0
    for row in range(1, len(seats) + 1):
        if row == len(seats) or seats[row] != seats[start] or row - start == 32:
            if seats[start] >= 0:
                items.append((start, row - start, seats[start]))
            start = row
    padded = torch.full((max(len(seats), 1), 3), -1, dtype=torch.int32)
    if items:
        padded[: len(items)] = torch.tensor(items, dtype=torch.int32)
    count = torch.tensor([len(items)], dtype=torch.int32)
    return torch.tensor(seats, dtype=torch.int32).cuda(), padded.cuda(), count.cuda()


def lora_of(kernels: Any, seats: Seats, row_seats: list[int]) -> SeatLora:
    lora: SeatLora = kernels.seat_lora(seats.table.cuda(), *items_of(row_seats))
    return lora
