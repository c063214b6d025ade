"""Linears of the base on the GPU: operands as `csrc/linear.cu` reads them, tilings, launches.

Few rows go through one fused launch that reads NF4; for many, `dequantized` makes the weight in
bf16 for cuBLAS. Knows no layers. Invariant: codes are moved, never changed, and what was packed is
unpacked and compared when it is made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from loriner.kernels.cuda import packing
from loriner.kernels.cuda.launch import Device, Kernel
from loriner.kernels.cuda.packing import BLOCK, TILE
from loriner.kernels.operands import Nf4

KIND_F32, KIND_NESTED, KIND_BF16 = 0, 1, 2
STORE, ADD, GATED, LOGITS = 0, 1, 2, 3  # EPILOGUE of linear.cu
MIN_SPAN = 8  # blocks that must share a nested scale's own scale, or scales are expanded
TOKEN_TILES = (1, 2, 3, 4, 6, 8)  # of 8 rows
STAGE_BYTES = 4 * BLOCK // 2  # of an output's codes in a warp's stage
MAX_FUSED_ROWS = 256  # beyond, tiles of bf16 and cuBLAS
SMEM_TABLE = 65536
SMEM_SHARED = 112 << 10  # two blocks fit a multiprocessor of 227 KiB
SMEM_MOST = 227 << 10
LEAN, LEAN_TILES = (
    96,
    2,
)  # registers of a thread up to so many token tiles: small kernels fit beside
DEEP_TILES = 4  # token tiles up to which registers hold two stages of weights
STAGE_BLOCKS = 4  # KU of linear.cu
GROUP_ROWS = 4 * TILE


class _Params(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("weight", "scale", "nested", "offset")],
        *[(name, ctypes.c_void_p) for name in ("bias", "x", "y", "seats", "row_seat", "shrunk")],
        ("code", ctypes.c_float * 16),
        ("map", ctypes.c_float * 256),
        *[(name, ctypes.c_int) for name in ("M", "N", "K", "KB", "nested_shift", "group")],
        *[(name, ctypes.c_int) for name in ("num_groups", "shrunk_stride", "split0", "split1")],
    ]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one linear is cut: see the defines of linear.cu."""

    row_groups: int  # of 64 outputs, four warps each
    input_groups: int  # that split the inputs
    cluster: int
    min_blocks: int = 1  # thread blocks that must fit a multiprocessor

    @property
    def rows(self) -> int:
        return self.row_groups * GROUP_ROWS

    @property
    def threads(self) -> int:
        return self.row_groups * self.input_groups * 128

    def sums(self, token_tiles: int) -> int:
        """Bytes of the groups' sums."""
        return self.input_groups * self.rows * (token_tiles * 8 + 4) * 4

    def smem(self, kind: int, token_tiles: int, ring: Ring) -> int:
        """Bytes of shared memory."""
        tokens = token_tiles * 8
        x = ring.stages * self.input_groups * ring.blocks * tokens * 128
        x += 0 if kind == KIND_BF16 else SMEM_TABLE
        sums = self.sums(token_tiles)
        return (x + sums if ring.apart else max(x, sums)) + tokens * 3 * 32

    def ring(self, kind: int, token_tiles: int) -> Ring:
        """The deepest ring of x that leaves room for the next kernel's block, or that fits at
        all."""
        for limit in (SMEM_SHARED, SMEM_MOST):
            for ring in RINGS:
                if self.smem(kind, token_tiles, ring) <= limit:
                    return ring
        raise AssertionError((self, kind, token_tiles))


class Ring(NamedTuple):
    """How x passes through shared memory."""

    blocks: int  # of 64 inputs of a group in one stage (XU)
    stages: int
    apart: bool  # sums have room beside it


RINGS = tuple(Ring(b, n, apart) for b in (4, 2, 1) for n in (3, 2) for apart in (True, False))


def tiling(outputs: int, inputs: int, num_sms: int, *, clusters: bool) -> Tiling:
    """Enough thread blocks for all multiprocessors (measured on Hopper)."""
    groups = -(-outputs // GROUP_ROWS)
    if groups >= 2 * num_sms:
        return Tiling(2, 1, 1, min_blocks=2)
    cluster = 1
    while clusters and cluster < 4 and groups * cluster * 3 <= num_sms * 2:
        if inputs // BLOCK < 32 * cluster:
            break
        cluster *= 2
    return Tiling(1, 4, cluster)


class Operand(NamedTuple):
    """A fused linear of the base, ready for `Linears`."""

    kind: int
    weight: Tensor  # [tiles, KB, 512] u8 codes, or [tiles, KB, 1024] bf16
    scale: Tensor | None  # [tiles, KB / 4, 16, 4] f32, or u8 when nested
    nested: packing.Nested | None
    values: tuple[float, ...]  # the 16 of NF4, then the 256 of nested scales
    table: Tensor | None  # [272] f32: the same on the device
    bias: Tensor | None  # [N] f32
    outputs: int
    inputs: int
    gated: bool
    slices: tuple[int, int]  # ends of the first and second slice, for adapters
    tiling: Tiling

    @property
    def num_slices(self) -> int:
        first, second = self.slices
        return 1 + (first < self.outputs) + (second < self.outputs)

    @property
    def num_bytes(self) -> int:
        """Bytes that a call reads, and that stay resident."""
        tensors = [self.weight, self.scale]
        tensors += [] if self.nested is None else [self.nested.outer, self.nested.offset]
        return sum(t.nbytes for t in tensors if t is not None)


class Adapters(NamedTuple):
    """What the epilogue needs to add adapters: all on the device, fixed for a captured graph."""

    seats: Tensor  # seat table [seats, groups, 96] u8
    row_seat: Tensor  # [M] i32
    shrunk: Tensor  # [M, stride] f32
    group: int


class Linears:
    """Prepares and runs the linears of one base on one device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.clusters = device.capability >= (9, 0)

    def prepare_nf4(
        self, parts: Sequence[Nf4], bias: Tensor | None, *, gated: bool = False
    ) -> Operand:
        """Fuse NF4 weights along their outputs. Raises ValueError for what the kernels cannot
        take."""
        place = self.device.torch_device
        outputs, inputs = sum(p.shape[0] for p in parts), parts[0].shape[1]
        cut = self._tiling(outputs, inputs, gated=gated)
        codes = torch.cat([p.packed.to(place).view(p.shape[0], -1) for p in parts])
        codes = packing.interleave(codes, gated=gated)
        padded = packing.pad_rows(packing.pad_inputs(codes, STAGE_BYTES), cut.rows)
        packed = packing.pack_codes(padded)
        if not torch.equal(packing.unpack_codes(packed)[:outputs, : inputs // 2], codes):
            raise ValueError("the packed codes differ from the stored ones")
        del codes
        span = _span(parts, inputs // BLOCK)
        if span >= MIN_SPAN:
            nested = _nested(parts, span, cut.rows, place, gated=gated)
            scale, kind = nested.indexes, KIND_NESTED
        else:
            absmax = [p.expanded().to(place).view(p.shape[0], -1) for p in parts]
            rows = packing.pad_inputs(
                packing.interleave(torch.cat(absmax), gated=gated), STAGE_BLOCKS
            )
            scale = packing.pack_scales(packing.pad_rows(rows, cut.rows)).contiguous()
            nested, kind = None, KIND_F32
        return Operand(
            kind,
            packed.contiguous(),
            scale,
            nested,
            _values(parts[0]),
            torch.tensor(_values(parts[0]), dtype=torch.float32, device=place),
            None if bias is None else bias.float().to(place),
            outputs,
            inputs,
            gated,
            _slices([p.shape[0] for p in parts]),
            cut,
        )

    def prepare_dense(
        self, weights: Sequence[Tensor], bias: Tensor | None, *, gated: bool = False
    ) -> Operand:
        """Fuse dense weights along their outputs; they become bf16."""
        place = self.device.torch_device
        rows = torch.cat([w.to(place).bfloat16() for w in weights])
        outputs, inputs = rows.shape
        cut = self._tiling(outputs, inputs, gated=gated)
        rows = packing.pad_inputs(packing.interleave(rows, gated=gated), STAGE_BLOCKS * BLOCK)
        rows = packing.pad_rows(rows, cut.rows)
        return Operand(
            KIND_BF16,
            packing.pack_bf16(rows).contiguous(),
            None,
            None,
            (0.0,) * 272,
            None,
            None if bias is None else bias.float().to(place),
            outputs,
            inputs,
            gated,
            _slices([len(w) for w in weights]),
            cut,
        )

    def run(
        self,
        x: Tensor,
        operand: Operand,
        y: Tensor,
        epilogue: int,
        adapters: Adapters | None = None,
        *,
        is_gelu: bool = False,
    ) -> None:
        """y (op)= x W^T + b + adapters, by `epilogue`.

        x [M, K] bf16 contiguous; y [M, N] bf16 (STORE), f32 += (ADD) or f32 (LOGITS), or
        [M, N/2] bf16 (GATED).
        """
        rows = x.shape[0]
        tiles = next((n for n in TOKEN_TILES if n * 8 >= rows), TOKEN_TILES[-1])
        cut = operand.tiling
        kernel = self.kernel(operand, epilogue, tiles, is_gelu=is_gelu)
        params = _params(x, operand, y, adapters)
        row_tiles = operand.weight.shape[0] * TILE // cut.rows
        grid = (row_tiles * cut.cluster, -(-rows // (tiles * 8)))
        kernel(grid, cut.threads, params, cluster=cut.cluster)

    def kernel(
        self, operand: Operand, epilogue: int, token_tiles: int, *, is_gelu: bool = False
    ) -> Kernel:
        """The compiled variant for this operand."""
        kind = operand.kind
        cut = operand.tiling
        ring = cut.ring(kind, token_tiles)
        module = self.device.module(
            "linear.cu",
            NT=token_tiles,
            WR=cut.row_groups,
            WK=cut.input_groups,
            XU=ring.blocks,
            STAGES=ring.stages,
            APART=int(ring.apart),
            DEPTH=2 if kind != KIND_BF16 and token_tiles <= DEEP_TILES else 1,
            CLUSTER=cut.cluster,
            KIND=kind,
            EPILOGUE=epilogue,
            MIN_BLOCKS=cut.min_blocks,
            REGISTERS=LEAN if cut.min_blocks == 1 and token_tiles <= LEAN_TILES else 0,
            GELU=int(is_gelu),
        )
        return module.kernel("linear", cut.smem(kind, token_tiles, ring))

    def _tiling(self, outputs: int, inputs: int, *, gated: bool) -> Tiling:
        if inputs % BLOCK or (gated and outputs % 16):
            raise ValueError(f"a linear of {outputs} x {inputs}: inputs must be a multiple of 64.")
        return tiling(outputs, inputs, self.device.num_sms, clusters=self.clusters)

    def dequantized(self, operand: Operand) -> Tensor:
        """The weight [N, K] bf16 in its own order, made anew."""
        if operand.kind == KIND_BF16:
            rows = packing.unpack_bf16(operand.weight)[:, : operand.inputs]
            return packing.deinterleave(rows[: operand.outputs], gated=operand.gated)
        place = self.device.torch_device
        out = torch.empty(operand.outputs, operand.inputs, dtype=torch.bfloat16, device=place)
        module = self.device.module("dequantize.cu", KIND=operand.kind, GATED=int(operand.gated))
        tiles, blocks = operand.weight.shape[:2]
        nested = operand.nested
        module.kernel("dequantize")(
            -(-tiles * blocks // 4),
            128,
            out,
            operand.weight,
            operand.scale,
            None if nested is None else nested.outer,
            None if nested is None else nested.offset,
            operand.table,
            tiles,
            operand.outputs,
            operand.inputs,
            blocks,
            0 if nested is None else nested.span_shift,
        )
        return out


def retiled(operand: Operand, cut: Tiling) -> Operand:
    """The same weights, cut otherwise; `cut` must divide the padded rows."""
    assert operand.weight.shape[0] * TILE % cut.rows == 0
    return operand._replace(tiling=replace(cut))


def _params(x: Tensor, operand: Operand, y: Tensor, adapters: Adapters | None) -> _Params:
    nested = operand.nested
    params = _Params(
        weight=operand.weight.data_ptr(),
        scale=_pointer(operand.scale),
        nested=None if nested is None else nested.outer.data_ptr(),
        offset=None if nested is None else nested.offset.data_ptr(),
        code=(ctypes.c_float * 16)(*operand.values[:16]),
        map=(ctypes.c_float * 256)(*operand.values[16:]),
        bias=_pointer(operand.bias),
        x=x.data_ptr(),
        y=y.data_ptr(),
        M=x.shape[0],
        N=operand.outputs,
        K=operand.inputs,
        KB=operand.weight.shape[1],
        nested_shift=0 if nested is None else nested.span_shift,
        split0=operand.slices[0],
        split1=operand.slices[1],
    )
    if adapters is not None:
        params.seats = adapters.seats.data_ptr()
        params.row_seat = adapters.row_seat.data_ptr()
        params.shrunk = adapters.shrunk.data_ptr()
        params.group, params.num_groups = adapters.group, adapters.seats.shape[1]
        params.shrunk_stride = adapters.shrunk.shape[1]
    return params


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _slices(sizes: Sequence[int]) -> tuple[int, int]:
    total = sum(sizes)
    first = sizes[0] if len(sizes) > 1 else total
    return first, first + sizes[1] if len(sizes) > 2 else total


def _span(parts: Sequence[Nf4], blocks: int) -> int:
    """Blocks of one row, from a multiple of them on, whose nested scales share their scale."""
    if any(p.nested is None for p in parts):
        return 0
    first = parts[0].nested
    assert first is not None
    if not all(p.nested is not None and torch.equal(p.nested.code, first.code) for p in parts):
        return 0
    span = 1
    while span < 256 and blocks % (span * 2) == 0:
        span *= 2
    return span


def _values(part: Nf4) -> tuple[float, ...]:
    nested = torch.zeros(256) if part.nested is None else part.nested.code
    return (*part.code.tolist(), *nested.tolist())


def _nested(
    parts: Sequence[Nf4], span: int, multiple: int, place: torch.device, *, gated: bool
) -> packing.Nested:
    indexes, outers, offsets = [], [], []
    for part in parts:
        assert part.nested is not None
        outputs, blocks = part.shape[0], part.shape[1] // BLOCK
        indexes.append(part.nested.index.to(place).view(outputs, blocks))
        starts = torch.arange(0, outputs * blocks, span, device=place)
        outer = part.nested.absmax.to(place)[starts // 256]
        outers.append(outer.view(outputs, blocks // span))
        offsets.append(torch.full((outputs, 1), part.nested.offset, device=place))

    def fused(rows: Sequence[Tensor]) -> Tensor:
        joined = packing.interleave(torch.cat(list(rows)), gated=gated)
        return packing.pad_rows(joined, multiple)

    index = packing.pack_scales(fused(indexes)).contiguous()
    offset = packing.pack_rows(fused(offsets))[:, 0].contiguous()
    outer = packing.pack_rows(fused(outers)).contiguous()
    return packing.Nested(index, outer, offset, span.bit_length() - 1)
