"""A step's numbers on their way to the device: one pinned buffer, one copy, static tensors.

Every field of `StepTensors` stands at a fixed place for a given `Shape`, so that a captured graph
finds it in every step; what varies in length comes last and is copied as far as it is used. Knows
no kernels. Invariant: rows, sequences and samples beyond the step's own are padding that stores
nothing, sees nothing and belongs to nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loriner.engine.step_input import Ints, Span, StepInput

LORA_ROWS = 32  # most rows of one item
ALIGN = 4  # int32s: every field starts on 16 bytes
NUM_COUNTS = 4


class Shape(NamedTuple):
    """How much a graph holds. A step fits when none of its numbers is larger."""

    rows: int
    sequences: int
    samples: int
    attn_items: int
    tile_items: int


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step on the device, int32 unless said; R rows, S sequences, B samples of its shape."""

    token_ids: Tensor  # [R]; 0 where `token_source` tells
    token_source: Tensor  # [R]: -1, or index into the previous step's tokens
    positions: Tensor  # [R]
    slots: Tensor  # [R]; -1: not stored
    row_seat: Tensor  # [R]; -1: base only
    q_start: Tensor  # [S + 1]
    context: Tensor  # [S]; 0: no sequence
    counts: Tensor  # [4]: used items of attn, tile, lora, sample
    lora_items: Tensor  # [R, 3]: first row, rows, seat
    sample_rows: Tensor  # [B]
    sample_seat: Tensor  # [B]
    sample_items: Tensor  # [B, 3]: as `lora_items`, over the sampled rows
    tile_items: Tensor  # [.., 2]: sequence, first row
    attn_items: Tensor  # [.., 8]: as decode's attention wants them
    block_table: Tensor  # [S, W]

    @property
    def num_attn_items(self) -> Tensor:
        return self.counts[0:1]

    @property
    def num_tile_items(self) -> Tensor:
        return self.counts[1:2]

    @property
    def num_lora_items(self) -> Tensor:
        return self.counts[2:3]

    @property
    def num_sample_items(self) -> Tensor:
        return self.counts[3:4]


def sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every field but the block table, in the order in which they stand: shapes in int32s."""
    rows, sequences, samples, attn_items, tile_items = shape
    return {
        **dict.fromkeys(("token_ids", "token_source", "positions", "slots"), (rows,)),
        "row_seat": (rows,),
        "q_start": (sequences + 1,),
        "context": (sequences,),
        "counts": (NUM_COUNTS,),
        "lora_items": (rows, 3),
        **dict.fromkeys(("sample_rows", "sample_seat"), (samples,)),
        "sample_items": (samples, 3),
        "tile_items": (tile_items, 2),
        "attn_items": (attn_items, 8),
    }


def offsets(shape: Shape) -> dict[str, tuple[int, int]]:
    """(start, end) of every field in int32s."""
    made, position = {}, 0
    for name, size in sizes(shape).items():
        count = int(np.prod(size))
        made[name] = (position, position + count)
        position += -(-count // ALIGN) * ALIGN
    return made


class WorkLists(NamedTuple):
    """What the attention kernels work through; made by their own module from plain numbers."""

    attn_items: Ints  # [n, 8]
    tile_items: Ints  # [m, 2]


class Seats(NamedTuple):
    """Which seat each row uses, and the same cut into items: i32, as kernels read them."""

    row_seat: Ints  # [R]
    items: Ints  # [n, 3]: first row, rows, seat


def seats_of(spans: tuple[Span, ...], seat_ids: list[int]) -> Seats:
    """Spans follow each other from row 0; rows after them have no adapter."""
    if not spans:
        return Seats(np.empty(0, np.int32), np.empty((0, 3), np.int32))
    ends = np.array([span.end for span in spans], np.int32)
    starts = np.concatenate((np.zeros(1, np.int32), ends[:-1]))
    assert spans[0].start == 0 and spans[-1].start == starts[-1]
    seats = np.array(seat_ids, np.int32)
    counts = ends - starts
    pieces = -(-counts // LORA_ROWS)
    which = np.arange(len(spans), dtype=np.int32).repeat(pieces)
    piece = np.arange(len(which), dtype=np.int32) - (pieces.cumsum(dtype=np.int32) - pieces)[which]
    first = starts[which] + piece * LORA_ROWS
    rows = np.minimum(ends[which] - first, LORA_ROWS)
    return Seats(seats.repeat(counts), np.stack((first, rows, seats[which]), axis=1))


class StepBuffers:
    """Two pinned buffers, taken in turns, and the device's copy of the newest. `width`: blocks of
    the longest context; `largest`: the shape that all others fit in."""

    def __init__(self, largest: Shape, width: int, device: torch.device) -> None:
        total = max(end for _, end in offsets(largest).values()) + ALIGN
        total += largest.sequences * width
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(total, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._arrays: list[Ints] = [host.numpy() for host in self._hosts]
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        size = (largest.sequences, width)
        self._table = torch.zeros(size, dtype=torch.int32, device=device)
        self._turn = 0
        self._offsets: dict[Shape, dict[str, tuple[int, int]]] = {}

    def tensors(self, shape: Shape) -> StepTensors:
        """Where a graph of this shape finds its step."""
        fields: dict[str, Tensor] = {}
        for name, (start, end) in offsets(shape).items():
            fields[name] = self._device[start:end].view(sizes(shape)[name])
        return StepTensors(**fields, block_table=self._table[: shape.sequences])

    def upload(
        self, step: StepInput, shape: Shape, lists: WorkLists, seats: Seats, sampled: Seats
    ) -> None:
        """Write `step` with its padding, and send it in one copy on the current stream. The buffer
        used two uploads ago must have been copied."""
        self._turn ^= 1
        host = self._arrays[self._turn]
        places = self._offsets.get(shape)
        if places is None:
            places = self._offsets.setdefault(shape, offsets(shape))
        counts = [len(items) for items in (*lists, seats.items, sampled.items)]
        padded = {
            "token_ids": (step.token_ids, 0),
            "token_source": (step.token_source, -1),
            "positions": (step.positions, 0),
            "slots": (step.slots, -1),
            "row_seat": (seats.row_seat, -1),
            "q_start": (step.q_start, step.num_rows),
            "context": (step.context, 0),
            "counts": (np.array(counts, np.int32), 0),
            "sample_rows": (step.sample_rows, 0),
            "sample_seat": (sampled.row_seat, -1),
        }
        for name, (values, padding) in padded.items():
            start, end = places[name]
            middle = start + len(values)
            assert middle <= end, name
            host[start:middle] = values
            host[middle:end] = padding
        items = {"lora_items": seats.items, "sample_items": sampled.items}
        items |= {"tile_items": lists.tile_items, "attn_items": lists.attn_items}
        used = 0
        for name, made in items.items():
            start, end = places[name]
            used = start + made.size
            assert used <= end, name
            host[start:used] = made.ravel()
        self._send(host, used, step.block_table)

    def _send(self, host: Ints, used: int, table: Ints) -> None:
        """The table follows the last item that is used, as wide as this step needs it."""
        num_sequences, width = table.shape
        end = used + table.size
        host[used:end] = table.ravel()
        self._device[:end].copy_(self._hosts[self._turn][:end], non_blocking=True)
        packed = self._device[used:end].view(num_sequences, width)
        self._table[:num_sequences, :width].copy_(packed)
