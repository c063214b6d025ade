"""Every CUDA kernel compiles for every architecture, and what its machine code may cost; no GPU.

The variants of linear.cu are those that `linear.Linears` asks a device for. Limits are about a
tenth above what was read off the code when they were set.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install cuda-bindings")

from loriner.kernels.cuda import linear, nvrtc, sampling, tiling
from loriner.kernels.cuda.linear import ADD, GATED, LOGITS, STORE
from loriner.kernels.cuda.tiling import KIND_BF16, KIND_F32, KIND_NESTED
from tests.kernels.sass import (
    WEIGHTS_OF_A_PRODUCT,
    Code,
    disassemble,
    disassembler,
    opcode,
    products,
)

try:
    nvrtc.version()
except RuntimeError as missing:
    pytest.skip(f"NVRTC: {missing}", allow_module_level=True)

HOPPER = "sm_90a"
CARDS = {  # compute capability, multiprocessors, bytes of shared memory that a block can have
    "sm_80": ((8, 0), 108, 163 << 10),
    "sm_86": ((8, 6), 84, 99 << 10),
    "sm_89": ((8, 9), 142, 99 << 10),
    "sm_90a": ((9, 0), 132, 227 << 10),
    "sm_100a": ((10, 0), 148, 227 << 10),
}
needs_disassembler = pytest.mark.skipif(
    disassembler() is None, reason="needs nvdisasm: pip install nvidia-cuda-nvdisasm"
)


class Linear(NamedTuple):
    """A fused linear of a known model."""

    name: str
    outputs: int
    inputs: int
    kind: int
    epilogue: int


LINEARS = (
    Linear("llama-3-8b qkv", 6144, 4096, KIND_NESTED, STORE),
    Linear("llama-3-8b o", 4096, 4096, KIND_NESTED, ADD),
    Linear("llama-3-8b gate_up", 28672, 4096, KIND_NESTED, GATED),
    Linear("llama-3-8b down", 4096, 14336, KIND_NESTED, ADD),
    Linear("llama-3-8b lm_head", 128256, 4096, KIND_BF16, LOGITS),
    Linear("llama-2-70b qkv", 10240, 8192, KIND_NESTED, STORE),
    Linear("llama-2-70b o", 8192, 8192, KIND_NESTED, ADD),
    Linear("llama-2-70b gate_up", 57344, 8192, KIND_NESTED, GATED),
    Linear("qwen3-4b o", 2560, 4096, KIND_NESTED, ADD),
    Linear("smollm2 qkv", 960, 576, KIND_F32, STORE),
    Linear("smollm2 down", 576, 1536, KIND_F32, ADD),
)
FULLY = (*LINEARS[:5], LINEARS[9])  # on Hopper: every number of token tiles
SOME = (LINEARS[1], LINEARS[2], LINEARS[4], LINEARS[9])  # elsewhere
ADAPTED = (LINEARS[1], LINEARS[2])  # with adapters
SOME_TILES = (1, 8, 16)
ADAPTED_TILES = (1, 2, 8, 16)

# Most instructions of a warp, by 32 lanes, for one weight on the way once round the main loop, by
# token tiles. Where the inputs are split among groups, a warp copies more rows of x.
MOST_PER_WEIGHT = {
    "split": {1: 2.6, 2: 2.9, 3: 4.0, 4: 3.6, 6: 3.5, 8: 3.5, 12: 4.9, 16: 5.2},
    "whole": {1: 2.8, 2: 2.7, 3: 2.8, 4: 3.0, 6: 3.4, 8: 3.5, 12: 4.8, 16: 5.2},
    "bf16": {1: 1.5, 2: 1.5, 3: 1.5, 4: 1.5, 6: 1.2, 8: 1.2},
}
MOST_LOCAL = 8  # accesses of local memory once round a main loop on Hopper: addresses, no weights
# Bytes of local memory that are known to be written, by token tiles and linear.
SPILLED: dict[str, dict[tuple[int, str], int]] = {
    "sm_80": {
        (8, "llama-3-8b o"): 36,
        (8, "llama-3-8b lm_head"): 32,
        (8, "smollm2 qkv"): 52,
        (1, "llama-3-8b o, adapted"): 8,
        (2, "llama-3-8b o, adapted"): 36,
        (8, "llama-3-8b o, adapted"): 52,
        (8, "llama-3-8b gate_up, adapted"): 4,
    },
    "sm_86": {
        (8, "llama-3-8b gate_up"): 36,
        (8, "llama-3-8b lm_head"): 32,
        (2, "llama-3-8b o, adapted"): 4,
        (8, "llama-3-8b gate_up, adapted"): 40,
    },
    "sm_90a": {
        (1, "llama-3-8b o, adapted"): 12,
        (2, "llama-3-8b o, adapted"): 12,
        (1, "llama-3-8b gate_up, adapted"): 12,
        (2, "llama-3-8b gate_up, adapted"): 16,
    },
    "sm_100a": {
        (8, "llama-3-8b o"): 12,
        (8, "llama-3-8b lm_head"): 80,
        (8, "smollm2 qkv"): 12,
        (8, "llama-3-8b o, adapted"): 36,
    },
}
SPILLED["sm_89"] = SPILLED["sm_86"]


class Recorder:
    """Stands for a device: notes the definitions that a variant is compiled with."""

    def __init__(self, arch: str) -> None:
        self.capability, self.num_sms, self.max_smem = CARDS[arch]
        self.torch_device, self.arch = torch.device("cpu"), arch
        self.defines: dict[str, int | str] = {}

    def module(self, source: str, **defines: int | str) -> Recorder:
        assert source == "linear.cu"
        self.defines = defines
        return self

    def kernel(self, name: str, smem: int) -> None:
        assert name == "linear" and smem <= self.max_smem


class Variant(NamedTuple):
    """A source, ready to be compiled."""

    arch: str
    source: str
    defines: tuple[tuple[str, int | str], ...]


def linear_variant(
    arch: str, case: Linear, token_tiles: int, *, is_gelu: bool = False, adapted: bool = False
) -> Variant:
    device: Any = Recorder(arch)
    linears = linear.Linears(device)
    cut = cut_of(linears, case)
    operand: Any = SimpleNamespace(
        kind=case.kind, tiling=cut, outputs=case.outputs, inputs=case.inputs
    )
    linears.kernel(operand, case.epilogue, token_tiles, is_gelu=is_gelu, adapted=adapted)
    return Variant(arch, "linear.cu", tuple(sorted(device.defines.items())))


def cut_of(linears: linear.Linears, case: Linear) -> tiling.Tiling:
    gated, is_nf4 = case.epilogue == GATED, case.kind != KIND_BF16
    return linears._tiling(case.outputs, case.inputs, gated=gated, is_nf4=is_nf4)


def linear_variants(arch: str) -> dict[tuple[int, str], Variant]:
    """By token tiles and the first linear that needs it."""
    made: dict[Variant, tuple[int, str]] = {}
    for case in LINEARS if arch == HOPPER else SOME:
        in_full = arch == HOPPER and case in FULLY
        tiles_of = tiling.TOKEN_TILES if in_full else SOME_TILES
        for tiles in sorted({fitting(arch, case, n) for n in tiles_of}):
            made.setdefault(linear_variant(arch, case, tiles), (tiles, case.name))
    for case in ADAPTED:
        for tiles in (fitting(arch, case, n) for n in ADAPTED_TILES):
            variant = linear_variant(arch, case, tiles, adapted=True)
            made.setdefault(variant, (tiles, f"{case.name}, adapted"))
    gelu = LINEARS[2]._replace(name="gelu")
    made.setdefault(linear_variant(arch, gelu, 1, is_gelu=True), (1, gelu.name))
    return {name: variant for variant, name in made.items()}


def fitting(arch: str, case: Linear, token_tiles: int) -> int:
    """As many token tiles, or the most that the card has room for."""
    device: Any = Recorder(arch)
    linears = linear.Linears(device)
    cut, rows = cut_of(linears, case), token_tiles * 8
    return tiling.token_tiles_of(cut, case.kind, rows, device.max_smem, is_wide=linears.maps)


def other_variants(arch: str) -> Iterator[Variant]:
    has_clusters = CARDS[arch][0] >= (9, 0)
    for kind in (KIND_F32, KIND_NESTED):
        yield Variant(arch, "dequantize.cu", (("GATED", 1), ("KIND", kind)))
    count = {HOPPER: 4, "sm_80": 2}.get(arch, 1)
    for group, head_dim in ((4, 128), (16, 256), (3, 64), (1, 128))[:count]:
        sizes = (("BLOCK_SIZE", 16), ("HEAD_DIM", head_dim))
        yield Variant(arch, "attention.cu", (*sizes, ("GROUP", group)))
        yield Variant(arch, "rope.cu", sizes)
    yield Variant(arch, "norm.cu", ())
    yield Variant(arch, "finish.cu", ())
    ranks = ("MAX_RANK", tiling.MAX_RANK)
    yield Variant(arch, "lora.cu", (("CLUSTER", 8 if has_clusters else 1), ranks))
    yield Variant(arch, sampling.SOURCE, (("CLUSTER", sampling.CLUSTER if has_clusters else 1),))


@functools.cache
def machine_code(variant: Variant) -> dict[str, Code]:
    return disassemble(compiled(variant))


def compiled(variant: Variant) -> bytes:
    return nvrtc.compile_cubin(variant.source, variant.arch, dict(variant.defines))


def all_codes(variants: Iterable[Variant]) -> list[dict[str, Code]]:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(machine_code, variants))


def note(line: str) -> None:
    sys.stdout.write(line + "\n")


def test_every_kernel_file_and_architecture_is_among_them() -> None:
    assert set(CARDS) == set(nvrtc.ARCHITECTURES)
    files = {path.name for path in nvrtc.SOURCES.glob("*.cu")}
    assert {"linear.cu", *(variant.source for variant in other_variants(HOPPER))} == files


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_every_kernel_compiles(arch: str) -> None:
    variants = [*linear_variants(arch).values(), *other_variants(arch)]
    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(compiled, variants))


def test_clusters_are_left_to_the_cards_that_have_them() -> None:
    sizes = {arch: dict(linear_variant(arch, LINEARS[1], 1).defines)["CLUSTER"] for arch in CARDS}
    assert [arch for arch, size in sizes.items() if size != 1] == ["sm_90a", "sm_100a"]


def test_a_kernel_that_does_not_compile_says_why() -> None:
    with pytest.raises(nvrtc.CompileError, match="multiples of 16"):
        nvrtc.compile_cubin("rope.cu", HOPPER, {"HEAD_DIM": 24})


@needs_disassembler
@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_linears_spill_no_more_than_is_known(arch: str) -> None:
    variants = linear_variants(arch)
    codes = zip(variants, all_codes(variants.values()), strict=True)
    spilled = {name: code["linear"].spilled for name, code in codes}
    assert {name: n for name, n in spilled.items() if n > SPILLED[arch].get(name, 0)} == {}


@needs_disassembler
def test_on_hopper_main_loops_hardly_spill() -> None:
    variants = linear_variants(HOPPER)
    for name, code in zip(variants, all_codes(variants.values()), strict=True):
        loop = code["linear"].main_loop()
        assert sum(opcode(text) in ("STL", "LDL") for text in loop) <= MOST_LOCAL, name


@needs_disassembler
def test_blocks_are_added_in_the_same_way_for_every_number_of_rows() -> None:
    """By the matrix unit, after one product: else a row's last bits would depend on its
    neighbours' number."""
    variants = linear_variants(HOPPER)
    for ((tiles, name), variant), code in zip(
        variants.items(), all_codes(variants.values()), strict=True
    ):
        opcodes = [opcode(text) for text in code["linear"].main_loop()]
        kind = dict(variant.defines)["KIND"]
        sums = 0 if kind == KIND_BF16 else tiling.STAGE_BLOCKS * tiles * 4
        units, nested = 2, 2 if kind == KIND_NESTED else 0  # a lane sees to two blocks' scales
        assert opcodes.count("FMUL") == (sums and sums + units + nested), (tiles, name)
        assert opcodes.count("FADD") == (sums and units + nested), (tiles, name)
        assert not {"FFMA", "HFMA2"} & set(opcodes), (tiles, name)


@needs_disassembler
def test_adapters_leave_the_main_loop_its_uniform_registers() -> None:
    """Where the compiler takes a branch for divergent, matrix descriptors go through R2UR."""
    variants = linear_variants(HOPPER)
    for name, code in zip(variants, all_codes(variants.values()), strict=True):
        opcodes = [opcode(text) for text in code["linear"].main_loop()]
        assert opcodes.count("R2UR") <= 8, name


@needs_disassembler
@pytest.mark.parametrize("arch", [HOPPER, "sm_80"])
def test_other_kernels_spill_nothing(arch: str) -> None:
    variants = list(other_variants(arch))
    for variant, functions in zip(variants, all_codes(variants), strict=True):
        assert functions
        spilled = {name: code.spilled for name, code in functions.items()}
        assert not any(spilled.values()), (variant, spilled)


@needs_disassembler
def test_a_weight_costs_few_instructions() -> None:
    variants = linear_variants(HOPPER)
    codes = all_codes(variants.values())
    for ((tiles, name), variant), code in zip(variants.items(), codes, strict=True):
        defines, loop = dict(variant.defines), code["linear"].main_loop()
        split = "whole" if defines["WK"] == 1 else "split"
        form = "bf16" if defines["KIND"] == KIND_BF16 else split
        per_weight = len(loop) * 32 / (products(loop) * WEIGHTS_OF_A_PRODUCT)
        note(f"{name}, {tiles * 8} rows: {per_weight:.2f} instructions per weight")
        assert per_weight <= MOST_PER_WEIGHT[form][tiles], (name, tiles)


@needs_disassembler
def test_on_hopper_four_warps_multiply_together() -> None:
    variants = linear_variants(HOPPER).values()
    for variant, code in zip(variants, all_codes(variants), strict=True):
        opcodes = [opcode(text) for text in code["linear"].main_loop()]
        assert opcodes.count("HGMMA") == 4 * tiling.STAGE_BLOCKS, variant
        # more where the compiler makes each product wait for the one before
        assert opcodes.count("WARPGROUP") <= 2 * tiling.STAGE_BLOCKS, variant
        assert "HMMA" not in opcodes


@needs_disassembler
@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_two_weights_cost_one_permutation_and_one_load_from_shared_memory(arch: str) -> None:
    named = linear_variants(arch)
    for tiles, name in [(fitting(arch, SOME[1], n), SOME[1].name) for n in SOME_TILES]:
        loop = machine_code(named[tiles, name])["linear"].main_loop()
        tokens = 1 if arch == HOPPER else tiles  # mma.sync multiplies 8 rows at a time
        pairs = products(loop) // tokens * WEIGHTS_OF_A_PRODUCT // 64
        nested = tiling.STAGE_BLOCKS // 2  # scales, looked up in the same way: two in each lane
        loads = [text for text in loop if re.match(r"(@!?U?P\d )?LDS R\d", text)]
        assert pairs + nested <= len(loads) <= 1.2 * (pairs + nested), (tiles, len(loads))
        assert sum(opcode(text) == "PRMT" for text in loop) <= 1.05 * (pairs + nested), tiles
        assert not {"LD", "ATOMS"} & {opcode(text) for text in loop}
