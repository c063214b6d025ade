"""One generation as the GPU reads it: a single stretch of bytes, and where each tensor stands.

A in bf16, the slices of a fused linear stacked by rank; B in bf16 as [n, r], which the GPU puts in
tiles in its place where sizes allow it; biases in f32; scales aside. Knows no device and no file.
Invariant: an image holds exactly the tensors of its adapter, each at its exact rank and on a
256-byte boundary, all finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loriner.adapters.adapter import Adapter
from loriner.adapters.host import Allocate, HostBuffer, pageable
from loriner.adapters.pool import Layout
from loriner.errors import InvalidAdapterError
from loriner.kernels.cuda.tiling import MAX_RANK
from loriner.kernels.operands import EMBEDDING, LAST_GROUPS, LAYER_GROUPS

ALIGNMENT = 256  # bytes; of every tensor
PAGE_BYTES = 16 << 10  # in which device memory is handed out
CHUNK_BYTES = 2 << 20  # an image may be split where a chunk has at least this much
MAX_SLICES = 3  # q, k and v
NONE = -1
_A, _B, _BIAS = 0, 1, 1 + MAX_SLICES  # columns of `ImagePlan.offsets`; from the last two on, slices

ENTRY = np.dtype(  # the entry of one fused linear in the seat table, as kernels read it
    [
        ("a", "<u8"),
        ("b", "<u8", MAX_SLICES),
        ("bias", "<u8", MAX_SLICES),
        ("scale", "<f4", MAX_SLICES),
        ("rank_end", "<i4", MAX_SLICES),
        ("tiled", "<u4"),  # bit i: B of slice i goes into tiles
        ("outputs", "<u4", MAX_SLICES),  # of slices
    ]
)
TILE, TILE_RANKS = 16, 4  # outputs and ranks of a tile of B


class Module(NamedTuple):
    """What an image must know of one module before its weights come."""

    rank: int
    num_in: int  # K; for the embedding, the vocabulary
    num_out: int
    has_bias: bool
    scaling: float


class Place(NamedTuple):
    """One tensor in an image."""

    offset: int  # bytes
    shape: tuple[int, ...]  # as stored in the image
    dtype: torch.dtype
    transposed: bool = False  # against the adapter's own tensor

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ImageLayout:
    """The fused linears of a base in the order of the seat table, and each module's slice."""

    def __init__(
        self, layout: Layout, *, page_bytes: int = PAGE_BYTES, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        assert page_bytes % ALIGNMENT == 0
        self.page_bytes, self.chunk_bytes = page_bytes, chunk_bytes
        self.groups = tuple(sorted({p.group for p in layout.values()}, key=_group_rank))
        index = {group: i for i, group in enumerate(self.groups)}
        members: dict[str, list[tuple[int, str]]] = {}
        for module, (group, offset) in layout.items():
            members.setdefault(group, []).append((offset, module))
        self.slices: dict[str, tuple[int, int]] = {}  # module -> (group's index, slice)
        for group, placed in members.items():
            assert len(placed) <= MAX_SLICES
            for i, (_, module) in enumerate(sorted(placed)):
                self.slices[module] = (index[group], i)
        self.embedding = index.get(EMBEDDING, NONE)


def _group_rank(group: str) -> tuple[int, int]:
    """Layers in order, then what comes after them."""
    if group in LAST_GROUPS:
        return 1 << 30, LAST_GROUPS.index(group)
    layer, _, name = group.partition(".")
    return int(layer), LAYER_GROUPS.index(name)


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """Where everything stands in an image; G fused linears."""

    num_bytes: int  # a multiple of the page
    places: Mapping[tuple[str, str], Place]  # (module, role) -> place
    offsets: NDArray[np.int64]  # [G, 7]: a, b of each slice, bias of each slice; bytes or NONE
    scales: NDArray[np.float32]  # [G, 3]
    rank_ends: NDArray[np.int32]  # [G, 3], cumulative
    tiled: NDArray[np.uint32]  # [G], bit i: B of slice i goes into tiles
    outputs: NDArray[np.uint32]  # [G, 3], of each slice
    chunks: tuple[tuple[int, int], ...]  # (start, end) in bytes, whole pages, covering the image
    chunk_of: NDArray[np.int64]  # [G]
    chunk_pages: tuple[int, ...]

    def entries(self, addresses: Sequence[int]) -> NDArray[np.uint8]:
        """The seat's row of the table, [G, 96], for chunks that stand at these addresses."""
        starts = np.array([start for start, _ in self.chunks], np.int64)
        shift = np.array(addresses, np.int64) - starts
        shifted = self.offsets + shift[self.chunk_of][:, None]
        pointers = np.where(self.offsets == NONE, 0, shifted).astype(np.uint64)
        table = np.zeros(len(pointers), ENTRY)
        table["a"] = pointers[:, _A]
        table["b"] = pointers[:, _B:_BIAS]
        table["bias"] = pointers[:, _BIAS:]
        table["scale"], table["rank_end"] = self.scales, self.rank_ends
        table["tiled"], table["outputs"] = self.tiled, self.outputs
        return table.view(np.uint8).reshape(len(table), ENTRY.itemsize)


def plan(modules: Mapping[str, Module], layout: ImageLayout) -> ImagePlan:
    """Lay out an image of these modules. Raises InvalidAdapterError for a scale beyond f32."""
    num_groups = len(layout.groups)
    made = _Planning(num_groups, layout)
    members: dict[int, list[tuple[int, str]]] = {}
    for name, module in modules.items():
        with np.errstate(over="ignore"):
            if not np.isfinite(np.float32(module.scaling)):
                raise InvalidAdapterError(["its weights times its scaling are not finite"])
        group, part = layout.slices[name]
        members.setdefault(group, []).append((part, name))
    for group in sorted(members):
        made.add_group(group, [(i, n, modules[n]) for i, n in sorted(members[group])])
    made.close_chunk()
    return ImagePlan(
        made.position,
        made.places,
        made.offsets,
        made.scales,
        made.rank_ends,
        made.tiled,
        made.outputs,
        tuple(made.chunks),
        made.chunk_of,
        tuple((end - start) // layout.page_bytes for start, end in made.chunks),
    )


class _Planning:
    """The end of the image so far, and what is known of it."""

    def __init__(self, num_groups: int, layout: ImageLayout) -> None:
        self.layout = layout
        self.position = 0
        self.places: dict[tuple[str, str], Place] = {}
        self.offsets = np.full((num_groups, 1 + 2 * MAX_SLICES), NONE, np.int64)
        self.scales = np.zeros((num_groups, MAX_SLICES), np.float32)
        self.rank_ends = np.zeros((num_groups, MAX_SLICES), np.int32)
        self.tiled = np.zeros(num_groups, np.uint32)
        self.outputs = np.zeros((num_groups, MAX_SLICES), np.uint32)
        self.chunks: list[tuple[int, int]] = []
        self.chunk_of = np.zeros(num_groups, np.int64)
        self._chunk_start = 0

    def add_group(self, group: int, members: Sequence[tuple[int, str, Module]]) -> None:
        """One fused linear. `members`: (slice, name, module), in the order of the slices."""
        if self.position - self._chunk_start >= self.layout.chunk_bytes:
            self.close_chunk()
        self.chunk_of[group] = len(self.chunks)
        self._add_a(group, members)
        rank = 0
        for part, name, module in members:
            rank += module.rank
            self.rank_ends[group, part:] = rank
            self.scales[group, part] = module.scaling
            shape = (module.num_out, module.rank)
            self.tiled[group] |= can_tile(*shape) << part
            self.outputs[group, part] = module.num_out
            self._add(group, _B + part, name, "b", shape, torch.bfloat16)
            if module.has_bias:
                self._add(group, _BIAS + part, name, "bias", shape[:1], torch.float32)

    def close_chunk(self) -> None:
        self.position = _round_up(self.position, self.layout.page_bytes)
        if self.position > self._chunk_start:
            self.chunks.append((self._chunk_start, self.position))
        self._chunk_start = self.position

    def _add_a(self, group: int, members: Sequence[tuple[int, str, Module]]) -> None:
        """The A of all slices, one on the other without gaps: they are read as one."""
        self.offsets[group, _A] = end = self.position
        transposed = group == self.layout.embedding
        for _, name, module in members:
            shape = (module.rank, module.num_in)
            place = Place(end, shape[::-1] if transposed else shape, torch.bfloat16, transposed)
            self.places[name, "a"] = place
            end += place.num_bytes
        self.position = _round_up(end, ALIGNMENT)

    def _add(
        self,
        group: int,
        column: int,
        module: str,
        role: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        place = Place(self.position, shape, dtype)
        self.places[module, role] = place
        self.offsets[group, column] = self.position
        self.position = _round_up(self.position + place.num_bytes, ALIGNMENT)


@dataclass(frozen=True, slots=True)
class SeatImage:
    """One generation's image on the host."""

    plan: ImagePlan
    buffer: HostBuffer

    @property
    def num_bytes(self) -> int:
        return self.plan.num_bytes

    @property
    def bytes(self) -> Tensor:
        return self.buffer.bytes[: self.plan.num_bytes]

    def free(self) -> None:
        """Give the memory back; the image is not used after that."""
        self.buffer.free()


def can_tile(num_out: int, rank: int) -> bool:
    """Whether B of this shape goes into tiles."""
    return num_out % TILE == 0 and rank % TILE_RANKS == 0 and rank <= MAX_RANK


def view(data: Tensor, place: Place) -> Tensor:
    """The tensor at `place` of an image's bytes."""
    end = place.offset + place.num_bytes
    return data[place.offset : end].view(place.dtype).view(place.shape)


def write(data: Tensor, place: Place, tensor: Tensor) -> None:
    """Convert an adapter's tensor to its place in an image's bytes."""
    view(data, place).copy_(tensor.t() if place.transposed else tensor)


def modules_of(adapter: Adapter) -> dict[str, Module]:
    return {
        name: Module(w.rank, w.a.shape[1], w.b.shape[0], w.bias is not None, w.scaling)
        for name, w in adapter.modules.items()
    }


def pack_image(adapter: Adapter, layout: ImageLayout, allocate: Allocate = pageable) -> SeatImage:
    """The image of `adapter`. Raises InvalidAdapterError where bf16 or a scale make it infinite."""
    made = plan(modules_of(adapter), layout)
    image = SeatImage(made, allocate(made.num_bytes))
    try:
        for (name, role), place in made.places.items():
            weight = adapter.modules[name]
            write(image.bytes, place, weight.tensors[role])
            low, high = torch.aminmax(view(image.bytes, place))
            largest = float(torch.maximum(-low, high))  # NaN stays NaN
            if not largest * max(1.0, abs(weight.scaling)) <= torch.finfo(torch.float32).max:
                raise InvalidAdapterError(["its weights times its scaling are not finite"])
    except BaseException:
        image.free()
        raise
    return image


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
