"""Linears of the base on the GPU: operands as `csrc/linear.cu` reads them, tilings, launches.

Up to a few hundred rows go through one fused launch that reads NF4; more are `many_rows.py`'s.
Knows no layers. Invariant: codes are moved, never changed, and what was packed is unpacked and
compared when it is made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loriner.kernels.cuda import packing
from loriner.kernels.cuda.launch import Device, Kernel, tensor_map
from loriner.kernels.cuda.packing import BLOCK, TILE
from loriner.kernels.cuda.params import MappedParams, Operand, Params, Values, params_of, values_of
from loriner.kernels.cuda.tiling import (
    KIND_BF16,
    KIND_F32,
    KIND_NESTED,
    MAX_STACKED_RANK,
    STAGE_BLOCKS,
    Ends,
    Ring,
    Tiling,
    choose,
    ends_of,
    num_parts,
    resident_blocks,
    ring_of,
    token_tiles_of,
)
from loriner.kernels.operands import Nf4

SOURCE = "linear.cu"
STORE, ADD, GATED, LOGITS = 0, 1, 2, 3  # EPILOGUE of linear.cu
MIN_SPAN = 8  # blocks that must share a nested scale's own scale, or scales are expanded
STAGE_BYTES = STAGE_BLOCKS * BLOCK // 2  # of an output's codes in a warp's stage
LEAN, LEAN_ADAPTED = 104, 112  # registers of a thread, where small kernels are to fit beside
LEAN_TILES = 2  # token tiles up to which they do
DEEP_TILES = 3  # token tiles up to which registers hold two stages of weights (or one more)
BLOCKS_A_ROUND = 4  # of a group's inputs: in their time a helper makes a unit of A x
MOST_ROUNDS_BESIDE = 2  # of units that a helper makes more than others, with fewer warps
BESIDE_REGISTERS = {8: 80, 4: 96}  # of a thread, where so many warps stand beside the main ones
MOST_ADAPTED_INPUTS = 65536  # quotient() of common.cuh is exact up to there
MOST_SHRUNK = 8 * 513 * MAX_STACKED_RANK  # values of A x that a launch may make


class LoraPlan(NamedTuple):
    """What `lora_plan` of lora.cu makes of a step's adapters, for every fused linear."""

    rows: Tensor  # [groups, M, 3, 32] u8
    tiles: Tensor  # [groups, tiles, 16] u8
    num_tiles: Tensor  # [groups] i32


class Adapters(NamedTuple):
    """The adapters of one fused linear: all on the device, fixed for a captured graph."""

    seats: Tensor  # seat table [seats, groups, 96] u8
    row_seat: Tensor  # [M] i32
    items: Tensor  # [.., 3] i32: first row, rows (at most 32), seat
    num_items: Tensor  # [1] i32
    plan: LoraPlan
    group: int


class Use(NamedTuple):
    """How a step multiplies by an operand."""

    operand: Operand
    epilogue: int
    is_gelu: bool = False


class Linears:
    """Prepares and runs the linears of one base on one device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.clusters = device.capability >= (9, 0)
        self.maps = device.arch == "sm_90a"
        self._gate = torch.tensor([1, 0], dtype=torch.int32, device=device.torch_device)
        self._shrunk = torch.zeros(MOST_SHRUNK, dtype=torch.int64, device=device.torch_device)

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
        span = packing.nested_span(parts, inputs // BLOCK)
        if span >= MIN_SPAN:
            nested = packing.pack_nested(parts, span, cut.rows, place, gated=gated)
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
            *values_of(parts[0]),
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
        cut = self._tiling(outputs, inputs, gated=gated, is_nf4=False)
        rows = packing.pad_inputs(packing.interleave(rows, gated=gated), STAGE_BLOCKS * BLOCK)
        rows = packing.pad_rows(rows, cut.rows)
        return Operand(
            KIND_BF16,
            packing.pack_bf16(rows).contiguous(),
            None,
            None,
            Values(),
            Values(),
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
        cut = operand.tiling
        tiles = token_tiles_of(cut, operand.kind, rows, self.device.max_smem, is_wide=self.maps)
        kernel = self.kernel(
            operand, epilogue, tiles, is_gelu=is_gelu, adapted=adapters is not None
        )
        ends = self._ends(operand, tiles, adapted=adapters is not None)
        plain = params_of(x, operand, y)
        grid = (cut.cluster, -(-rows // (tiles * 8)), operand.weight.shape[0] * TILE // cut.rows)
        if adapters is not None:
            self._add_adapters(plain, adapters, cut)
            grid = self._with_helpers(plain, grid, cut, ends)
        params: ctypes.Structure = plain
        if self.maps:
            ring = self._ring(operand, tiles, ends)
            params = MappedParams(tensor_map(x, ring.blocks, tiles * 8), plain)
        threads = cut.threads + (32 * ends.beside if ends else 0)
        kernel(grid, threads, params, cluster=cut.cluster)

    def kernel(
        self,
        operand: Operand,
        epilogue: int,
        token_tiles: int,
        *,
        is_gelu: bool = False,
        adapted: bool = False,
    ) -> Kernel:
        """The compiled variant for this operand."""
        use = Use(operand, epilogue, is_gelu)
        defines = self._defines(use, token_tiles, adapted=adapted)
        return self.device.module(SOURCE, **defines).kernel("linear", defines["SMEM"])

    def variants(self, uses: Iterable[tuple[Use, Sequence[int]]]) -> list[dict[str, int | str]]:
        """The defines of all kernels that steps of so many rows launch, with adapters and without
        them, each once."""
        smem = self.device.max_smem
        found: dict[tuple[tuple[str, int], ...], None] = {}  # in order
        for use, rows in uses:
            cut, kind = use.operand.tiling, use.operand.kind
            for tiles in {token_tiles_of(cut, kind, n, smem, is_wide=self.maps) for n in rows}:
                for adapted in (False, True):
                    found[tuple(self._defines(use, tiles, adapted=adapted).items())] = None
        return [dict(items) for items in found]

    def _defines(self, use: Use, token_tiles: int, *, adapted: bool) -> dict[str, int]:
        cut, kind = use.operand.tiling, use.operand.kind
        ends = self._ends(use.operand, token_tiles, adapted=adapted)
        ring = self._ring(use.operand, token_tiles, ends)
        in_registers = kind != KIND_BF16 and not ring.weights
        deep = DEEP_TILES + (cut.input_groups == 1) if in_registers else 0
        lean = LEAN_ADAPTED if adapted else LEAN
        is_lean = cut.min_blocks == 1 and token_tiles <= LEAN_TILES
        beside = ends.beside if ends else 0
        registers = BESIDE_REGISTERS[beside] if beside else lean if is_lean else 0
        return {
            "NT": token_tiles,
            "WR": cut.row_groups,
            "WK": cut.input_groups,
            "XU": ring.blocks,
            "STAGES": ring.stages,
            "APART": int(ring.apart),
            "RING": ring.weights,
            "DEPTH": 2 if token_tiles <= deep else 1,
            "CLUSTER": cut.cluster,
            "KIND": kind,
            "EPILOGUE": use.epilogue,
            "MIN_BLOCKS": cut.min_blocks,
            "REGISTERS": registers,
            "GELU": int(use.is_gelu),
            "LORA": int(adapted),
            "BESIDE": beside,
            "STEPS": ends.steps if ends else 0,
            "BUFFERS": ends.buffers if ends else 0,
            "SMEM": cut.smem(kind, token_tiles, ring, ends),
        }

    def _ends(self, operand: Operand, token_tiles: int, *, adapted: bool) -> Ends | None:
        if not adapted:
            return None
        cut, smem = operand.tiling, self.device.max_smem
        return ends_of(cut, operand.kind, operand.inputs, token_tiles, smem, is_wide=self.maps)

    def _ring(self, operand: Operand, token_tiles: int, ends: Ends | None) -> Ring:
        cut, smem = operand.tiling, self.device.max_smem
        ring = ring_of(cut, operand.kind, token_tiles, smem, ends, is_wide=self.maps)
        assert ring is not None, "token_tiles are what fits"
        return ring

    def _with_helpers(
        self, params: Params, grid: tuple[int, int, int], cut: Tiling, ends: Ends | None
    ) -> tuple[int, int, int]:
        """The grid with a block for each multiprocessor that has none: they multiply A x."""
        if grid[:2] == (1, 1) and cut.min_blocks == 1:
            params.helpers = max(0, self.device.num_sms - grid[2])
            rounds = max(1, params.K // BLOCK // cut.input_groups // BLOCKS_A_ROUND)
            params.rounds = min(rounds, MOST_ROUNDS_BESIDE) if ends and ends.beside else rounds
        return grid[0], grid[1], grid[2] + params.helpers

    def _add_adapters(self, params: Params, adapters: Adapters, cut: Tiling) -> None:
        parts = num_parts(params.K)
        size = parts * params.M * MAX_STACKED_RANK
        if size > len(self._shrunk) or params.K > MOST_ADAPTED_INPUTS:
            raise ValueError(f"{params.M} rows of {params.K} inputs: too many for adapters.")
        rows, tiles, num_tiles = adapters.plan
        params.rows = rows[adapters.group].data_ptr()
        params.tiles, params.max_tiles = tiles[adapters.group].data_ptr(), tiles.shape[1]
        params.num_tiles = num_tiles[adapters.group :].data_ptr()
        params.shrunk, params.shrunk_size = self._shrunk.data_ptr(), len(self._shrunk)
        params.gate = self._gate.data_ptr()
        params.shrunk_stride, params.parts = MAX_STACKED_RANK, parts
        params.workers = resident_blocks(cut, self.device.num_sms)

    def _tiling(self, outputs: int, inputs: int, *, gated: bool, is_nf4: bool = True) -> Tiling:
        if inputs % BLOCK or (gated and outputs % 16):
            raise ValueError(f"a linear of {outputs} x {inputs}: inputs must be a multiple of 64.")
        sms = self.device.num_sms
        return choose(
            outputs, inputs, sms, clusters=self.clusters, is_wide=self.maps, is_nf4=is_nf4
        )


def _slices(sizes: Sequence[int]) -> tuple[int, int]:
    total = sum(sizes)
    first = sizes[0] if len(sizes) > 1 else total
    return first, first + sizes[1] if len(sizes) > 2 else total
