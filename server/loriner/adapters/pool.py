"""Seats: the memory from which adapters run, each generation at its exact rank.

Knows bytes, pins and age; does not know who uses a seat or where adapters come from. Invariant: a
pinned seat is never evicted, and the bytes in use are the sum over seats (`check_integrity`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loriner.adapters.adapter import Adapter, LoraWeight
from loriner.errors import InvalidAdapterError
from loriner.kernels.operands import LoraEmbedding, LoraGroup, LoraPart


class Placement(NamedTuple):
    """Where one module's outputs stand in the fused linear that computes it."""

    group: str  # key of the fused linear, e.g. "3.qkv"
    offset: int  # first output column


Layout = Mapping[str, Placement]  # HF module name -> placement
EMBEDDING = "embed"  # the group of the token embedding


@dataclass(frozen=True, slots=True)
class SeatWeights:
    """One generation's weights as kernels read them."""

    groups: Mapping[str, LoraGroup]
    embedding: LoraEmbedding | None
    num_bytes: int


def pack(adapter: Adapter, layout: Layout, dtype: torch.dtype) -> SeatWeights:
    """Lay out `adapter` for the kernels: slices of a fused linear share one A, stacked by rank."""
    members: dict[str, list[tuple[int, LoraWeight]]] = {}
    embedding = None
    for module, weight in adapter.modules.items():
        group, offset = layout[module]
        if group == EMBEDDING:
            b = weight.b.t().to(dtype) * weight.scaling
            embedding = LoraEmbedding(weight.a.t().to(dtype).contiguous(), b.contiguous())
        else:
            members.setdefault(group, []).append((offset, weight))
    groups = {key: _pack_group(weights, dtype) for key, weights in members.items()}
    tensors = [t for group in groups.values() for t in _tensors(group)]
    tensors += [embedding.a, embedding.b] if embedding else []
    if not all(torch.isfinite(t).all() for t in tensors):
        raise InvalidAdapterError(["its weights times its scaling are not finite"])
    return SeatWeights(groups, embedding, sum(t.nbytes for t in tensors))


def _pack_group(weights: list[tuple[int, LoraWeight]], dtype: torch.dtype) -> LoraGroup:
    """bf16 weights stay bf16, which is exact and half the bytes; all others become `dtype`."""
    tensors = [t for _, weight in weights for t in (weight.a, weight.b)]
    kept = torch.bfloat16 if all(t.dtype is torch.bfloat16 for t in tensors) else dtype
    parts = []
    row = 0
    weights.sort(key=lambda item: item[0])
    for offset, weight in weights:
        rank, scaling = weight.a.shape[0], weight.scaling
        b = weight.b.t().to(kept).contiguous()  # [R, n]
        bias = None if weight.bias is None else weight.bias.to(dtype) * scaling
        parts.append(LoraPart(offset, row, row + rank, b, scaling, bias))
        row += rank
    a = torch.cat([weight.a.to(kept) for _, weight in weights])  # [sum of R, K]
    return LoraGroup(a, tuple(parts))


def _tensors(group: LoraGroup) -> list[Tensor]:
    biases = [part.bias for part in group.parts if part.bias is not None]
    return [group.a, *(part.b for part in group.parts), *biases]


class _Seat:
    __slots__ = ("pins", "weights")

    def __init__(self, weights: SeatWeights) -> None:
        self.weights = weights
        self.pins = 0


class Pool:
    """Generations that can run now, least recently used first."""

    def __init__(self, budget_bytes: int, max_seats: int) -> None:
        self.budget_bytes = budget_bytes
        self.max_seats = max_seats
        self.used_bytes = 0
        self.num_evictions = 0
        self._seats: OrderedDict[str, _Seat] = OrderedDict()
        self.kept: frozenset[str] = frozenset()  # pinned by an operator: the last to be evicted

    def __contains__(self, generation: str) -> bool:
        return generation in self._seats

    def __len__(self) -> int:
        return len(self._seats)

    def weights(self, generation: str) -> SeatWeights:
        return self._seats[generation].weights

    def num_pins(self, generation: str) -> int:
        seat = self._seats.get(generation)
        return seat.pins if seat else 0

    def can_seat(self, num_bytes: int) -> bool:
        """Whether a new generation of this size fits once every idle seat is given up."""
        idle = [self._seats[g].weights.num_bytes for g in self._idle()]
        seats = len(self._seats) - len(idle)
        return (
            seats < self.max_seats and self.used_bytes - sum(idle) + num_bytes <= self.budget_bytes
        )

    def seat(self, generation: str, weights: SeatWeights) -> list[str]:
        """Give `generation` a seat, evicting the least recently used idle ones; returns those."""
        assert generation not in self._seats and self.can_seat(weights.num_bytes)
        evicted = []
        for victim in self._idle():
            if self.has_room(weights.num_bytes):
                break
            self.evict(victim)
            self.num_evictions += 1
            evicted.append(victim)
        self._seats[generation] = _Seat(weights)
        self.used_bytes += weights.num_bytes
        return evicted

    def acquire(self, generation: str) -> None:
        """Pin the seat for one running sequence."""
        self._seats[generation].pins += 1
        self._seats.move_to_end(generation)

    def release(self, generation: str) -> None:
        seat = self._seats[generation]
        assert seat.pins > 0
        seat.pins -= 1

    def can_evict(self, generation: str) -> bool:
        return self.num_pins(generation) == 0

    def evict(self, generation: str) -> None:
        assert self.can_evict(generation)
        seat = self._seats.pop(generation, None)
        self.used_bytes -= seat.weights.num_bytes if seat else 0

    def check_integrity(self) -> None:
        assert self.used_bytes == sum(s.weights.num_bytes for s in self._seats.values())
        assert len(self._seats) <= self.max_seats and self.used_bytes <= self.budget_bytes
        assert all(seat.pins >= 0 for seat in self._seats.values())

    def has_room(self, num_bytes: int) -> bool:
        """Whether a new generation of this size fits without taking any seat away."""
        return (
            len(self._seats) < self.max_seats and self.used_bytes + num_bytes <= self.budget_bytes
        )

    def _idle(self) -> list[str]:
        """Seats that can be given up, least recently used first, those to be kept last."""
        idle = [g for g, seat in self._seats.items() if not seat.pins]
        return sorted(idle, key=lambda g: g in self.kept)
