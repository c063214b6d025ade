"""Seats: the memory from which adapters run, each generation at its exact rank.

Knows bytes, pins and age; does not know who uses a seat, where adapters come from, or what kind of
memory it is (`Memory`). Invariant: a pinned seat is never evicted, and no two generations share a
seat's number or bytes (`check_integrity`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loriner.adapters.adapter import Adapter, LoraWeight
from loriner.adapters.memory import HostSeats, Memory
from loriner.adapters.memory import Weights as Weights
from loriner.errors import InvalidAdapterError
from loriner.kernels.operands import EMBEDDING, LoraEmbedding, LoraGroup, LoraPart


class Placement(NamedTuple):
    """Where one module's outputs stand in the fused linear that computes it."""

    group: str  # key of the fused linear, e.g. "3.qkv"
    offset: int  # first output column


Layout = Mapping[str, Placement]  # HF module name -> placement


@dataclass(frozen=True, slots=True)
class SeatWeights:
    """One generation's weights as kernels read them."""

    groups: Mapping[str, LoraGroup]
    embedding: LoraEmbedding | None
    num_bytes: int

    def free(self) -> None:
        """The garbage collector does it: steps may still read them."""


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
    __slots__ = ("num_bytes", "pins", "seat_id", "weights")

    def __init__(self, seat_id: int, num_bytes: int, weights: Weights | None) -> None:
        self.seat_id = seat_id
        self.num_bytes = num_bytes
        self.weights = weights  # where the seat is the host's weights themselves
        self.pins = 0


class Pool:
    """Generations that can run now. `memory`: where their seats lie; a number is that many bytes
    of the host's."""

    def __init__(self, memory: Memory | int, max_seats: int) -> None:
        self.memory: Memory = HostSeats(memory) if isinstance(memory, int) else memory
        self.max_seats = max_seats
        self.num_evictions = 0
        self.kept: frozenset[str] = frozenset()  # pinned by an operator: the last to be evicted
        self._seats: dict[str, _Seat] = {}
        self._idle: OrderedDict[str, None] = (
            OrderedDict()
        )  # without pins, least recently used first
        self._pinned_bytes = 0
        self._free_ids = list(range(max_seats - 1, -1, -1))  # the last is the next
        self._version = 0  # of all that `can_seat` depends on
        self._refused: tuple[int, frozenset[str], int] | None = None
        self._answer: tuple[int, frozenset[str], Weights, list[str]] | None = None

    def __contains__(self, generation: str) -> bool:
        return generation in self._seats

    def __len__(self) -> int:
        return len(self._seats)

    @property
    def budget_bytes(self) -> int:
        return self.memory.budget_bytes

    @property
    def used_bytes(self) -> int:
        return self.memory.used_bytes

    def weights(self, generation: str) -> SeatWeights:
        """What the CPU's kernels read."""
        weights = self._seats[generation].weights
        assert isinstance(weights, SeatWeights)
        return weights

    def seat_id(self, generation: str) -> int:
        """The seat's number, below `max_seats`; it stays while the seat does."""
        return self._seats[generation].seat_id

    def is_ready(self, generation: str) -> bool:
        """Whether the weights have arrived, so that a step may read them."""
        return self.memory.is_ready(self._seats[generation].seat_id)

    def num_pins(self, generation: str) -> int:
        seat = self._seats.get(generation)
        return seat.pins if seat else 0

    def note_launch(self, event: Any) -> None:
        """To be called after each launch of a step: memory given up from now on is overwritten
        only after `event`."""
        self.memory.note_launch(event)

    def has_room(self, weights: Weights) -> bool:
        """Whether a new generation fits without taking any seat away."""
        return bool(self._free_ids) and self.memory.can_place(weights)

    def can_seat(self, weights: Weights) -> bool:
        """Whether a new generation fits once every idle seat is given up."""
        return self._victims(weights) is not None

    def seat(self, generation: str, weights: Weights) -> list[str]:
        """Give `generation` a seat, evicting the least recently used idle ones; returns those."""
        assert generation not in self._seats
        victims = self._victims(weights)
        assert victims is not None, "seat without can_seat"
        for victim in victims:
            self.evict(victim)
        self.num_evictions += len(victims)
        seat_id = self._free_ids.pop()
        self.memory.place(seat_id, weights)
        shared = weights if self.memory.shares_host else None
        self._seats[generation] = _Seat(seat_id, weights.num_bytes, shared)
        self._idle[generation] = None
        self._version += 1
        self._answer = None
        return victims

    def acquire(self, generation: str) -> None:
        """Pin the seat for one running sequence."""
        seat = self._seats[generation]
        seat.pins += 1
        if seat.pins == 1:
            del self._idle[generation]
            self._pinned_bytes += seat.num_bytes
            self._version += 1

    def release(self, generation: str) -> None:
        seat = self._seats[generation]
        assert seat.pins > 0
        seat.pins -= 1
        if seat.pins == 0:
            self._idle[generation] = None
            self._pinned_bytes -= seat.num_bytes
            self._version += 1

    def can_evict(self, generation: str) -> bool:
        return self.num_pins(generation) == 0

    def evict(self, generation: str) -> None:
        assert self.can_evict(generation)
        seat = self._seats.pop(generation, None)
        if seat is None:
            return
        del self._idle[generation]
        self.memory.clear(seat.seat_id)
        self._free_ids.append(seat.seat_id)
        self._version += 1

    def close(self) -> None:
        self.memory.close()

    def check_integrity(self) -> None:
        self.memory.check_integrity()
        seats = self._seats.values()
        assert all(seat.pins >= 0 for seat in seats)
        assert self._pinned_bytes == sum(seat.num_bytes for seat in seats if seat.pins)
        assert set(self._idle) == {g for g, seat in self._seats.items() if not seat.pins}
        ids = [*(seat.seat_id for seat in seats), *self._free_ids]
        assert sorted(ids) == list(range(self.max_seats)), "two generations share a seat"
        assert self.used_bytes <= self.budget_bytes

    def _victims(self, weights: Weights) -> list[str] | None:
        """Whom a new generation would push out; None when even that is not enough."""
        if self._answer is not None:
            version, kept, asked, victims = self._answer
            if version == self._version and kept == self.kept and asked is weights:
                return victims
        found = self._find_victims(weights)
        self._answer = None if found is None else (self._version, self.kept, weights, found)
        return found

    def _find_victims(self, weights: Weights) -> list[str] | None:
        if self.has_room(weights):
            return []
        if self._pinned_bytes + weights.num_bytes > self.budget_bytes or not (
            self._idle or self._free_ids
        ):
            return None
        question = (self._version, self.kept, weights.num_bytes)
        if question == self._refused:
            return None
        order = self._in_order_of_eviction()
        count = self.memory.num_victims(weights, (self._seats[g].seat_id for g in order))
        if count is None:
            self._refused = question
            return None
        return order[: max(count, 0 if self._free_ids else 1)]

    def _in_order_of_eviction(self) -> list[str]:
        """Least recently used first, those to be kept last."""
        if not self.kept:
            return list(self._idle)
        return sorted(self._idle, key=self.kept.__contains__)
