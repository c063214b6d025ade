"""Adapters in seats: put in order when they have come, and planned for each step.

Knows the seat table and `csrc/lora.cu`; no pool and no copies. Invariant: each `SeatLora` is
planned in its step, before the linears that read it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loriner.kernels.cuda.launch import Module
from loriner.kernels.cuda.linear import Adapters, LoraPlan
from loriner.kernels.cuda.tiling import MAX_STACKED_RANK
from loriner.kernels.operands import EMBEDDING, LAST_GROUPS, LAYER_GROUPS

_TILE_BLOCKS = 128  # of a fused linear: short ones, as they come between a step's


class SeatLora(NamedTuple):
    """The adapters of one step: what stands in the seats, and which row uses which."""

    table: Tensor  # [seats, groups, 96] u8
    row_seat: Tensor  # [R] i32
    items: Tensor  # [.., 3] i32: first row, rows (at most 32), seat
    num_items: Tensor  # [1] i32
    plan: LoraPlan

    def operand(self, group: str) -> LoraCall:
        """What `linear` needs for this fused linear."""
        num_groups = self.table.shape[1]
        if group in LAST_GROUPS:
            index = num_groups - len(LAST_GROUPS) + LAST_GROUPS.index(group)
        else:
            layer, _, name = group.partition(".")
            index = int(layer) * len(LAYER_GROUPS) + LAYER_GROUPS.index(name)
        return LoraCall(self, index)

    @property
    def embeddings(self) -> LoraCall:
        return self.operand(EMBEDDING)


class LoraCall(NamedTuple):
    """One fused linear's place in the seats."""

    lora: SeatLora
    group: int

    @property
    def adapters(self) -> Adapters:
        return Adapters(*self.lora, self.group)


class Seats:
    """The kernels that see to seats."""

    def __init__(self, lora: Module) -> None:
        self._tile, self._plan = lora.kernel("lora_tile"), lora.kernel("lora_plan")
        self._embed = lora.kernel("lora_embed")

    def tile(self, entries: Tensor) -> None:
        """Put B of the adapter with these entries [G, 96] in tiles, in its place; it has come as
        [n, r]. Once."""
        self._tile((_TILE_BLOCKS, len(entries)), 128, entries, pdl=False)

    def plan(self, table: Tensor, row_seat: Tensor, items: Tensor, num_items: Tensor) -> SeatLora:
        for indices in (row_seat, items, num_items):  # of another type, linears would wait for ever
            assert indices.dtype is torch.int32 and indices.is_contiguous()
        rows, groups, place = len(row_seat), table.shape[1], table.device
        most = rows * (MAX_STACKED_RANK // 16)
        plan = LoraPlan(
            torch.empty(groups, rows, 3, 32, dtype=torch.uint8, device=place),
            torch.empty(groups, most, 16, dtype=torch.uint8, device=place),
            torch.empty(groups, dtype=torch.int32, device=place),
        )
        made = (plan.rows, plan.tiles, plan.num_tiles, most)
        self._plan(groups, 256, *made, row_seat, rows, items, num_items, table, 0, groups)
        return SeatLora(table, row_seat, items, num_items, plan)

    def embed(self, h: Tensor, token_ids: Tensor, call: LoraCall) -> None:
        """h [R, H] f32 += what adapters add to the embedding."""
        lora, (rows, hidden) = call.lora, h.shape
        grid = (-(-hidden // 256), rows)
        seats = (lora.row_seat, lora.table, call.group, lora.table.shape[1])
        self._embed(grid, 256, h, hidden, token_ids, *seats)
