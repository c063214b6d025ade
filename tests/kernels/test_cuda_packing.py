"""How linears are laid out for the GPU: packed bytes, scales, tilings. Runs without one.

The expected places come from the PTX ISA ("Matrix Fragments for mma.m16n8k16", operand A), written
down here a second time.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cuda.bindings")

from loriner.kernels.cuda import linear, packing, tiling
from loriner.kernels.cuda.linear import Linears
from loriner.kernels.cuda.params import CODE_UNIT, SUM_UNIT, Params
from loriner.kernels.cuda.tiling import KIND_BF16, KIND_F32, KIND_NESTED
from loriner.kernels.operands import NestedScales, Nf4
from loriner.model.nf4 import dynamic_map, nf4_code, quantize_nf4

KINDS = (KIND_F32, KIND_NESTED, KIND_BF16)
SHAPES = (
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),  # llama-3-8b
    *((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),  # llama-2-70b
    *((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)),  # smollm2
    *((2560, 4096), (2560, 9728), (1, 64), (16, 64), (64, 16384), (1040, 2048)),
)
HOPPER_SMEM = 227 << 10
CARDS = {"A100": (108, False), "4090": (128, False), "H100": (132, True), "B200": (148, True)}
MAX_SMEM = {"A100": 163 << 10, "4090": 99 << 10, "H100": HOPPER_SMEM, "B200": HOPPER_SMEM}


def place(device_sms: int = 132, *, clusters: bool = True) -> Linears:
    capability = (9, 0) if clusters else (8, 0)
    device: Any = SimpleNamespace(
        capability=capability, arch="sm_90a", num_sms=device_sms, torch_device=torch.device("cpu")
    )
    return Linears(device)


def random_nf4(outputs: int, inputs: int, *, nested: bool, code: torch.Tensor | None = None) -> Nf4:
    blocks = outputs * inputs // 64
    packed = torch.randint(0, 256, (outputs * inputs // 2,), dtype=torch.uint8)
    if not nested:
        return Nf4(packed, torch.rand(blocks) + 0.01, nf4_code(), (outputs, inputs))
    index = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    outer = torch.rand(-(-blocks // 256)) * 0.01 + 0.01
    offset = float(torch.rand(()))
    map_ = dynamic_map() if code is None else code
    return Nf4(packed, NestedScales(index, outer, map_, offset), nf4_code(), (outputs, inputs))


def fragment(lane: int, register: int, element: int) -> tuple[int, int]:
    """Row and column of A that a lane holds in half `element` of register a0..a3."""
    group, thread = lane >> 2, lane % 4
    i = register * 2 + element  # the index of a_i
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
    return row, column


@given(tiles=st.integers(1, 5), blocks=st.integers(1, 9))
def test_packed_codes_and_weights_unpack_to_themselves(tiles: int, blocks: int) -> None:
    codes = torch.randint(0, 256, (tiles * 16, blocks * 32), dtype=torch.uint8)
    packed = packing.pack_codes(codes)
    assert packed.shape == (tiles, blocks, 512)
    assert torch.equal(packing.unpack_codes(packed), codes)
    weight = torch.randn(tiles * 16, blocks * 64).bfloat16()
    packed = packing.pack_bf16(weight)
    assert packed.shape == (tiles, blocks, 1024)
    assert torch.equal(packing.unpack_bf16(packed), weight)


def test_a_lane_finds_its_codes_where_the_fragment_wants_them() -> None:
    nibbles = torch.randint(0, 16, (32, 192), dtype=torch.uint8)
    packed = packing.pack_codes(nibbles[:, 0::2] << 4 | nibbles[:, 1::2])
    for tile, block, lane in itertools.product(range(2), range(3), range(32)):
        word = packed[tile, block, lane * 16 : lane * 16 + 16].tolist()
        for k, register, element in itertools.product(range(4), range(4), range(2)):
            row, column = fragment(lane, register, element)
            found = word[k * 4 + register] >> 4 * element & 15
            assert found == nibbles[tile * 16 + row, block * 64 + k * 16 + column]


def test_a_lane_finds_its_bf16_weights_where_the_fragment_wants_them() -> None:
    weight = torch.randn(32, 128).bfloat16()
    packed = packing.pack_bf16(weight)
    for tile, block, lane in itertools.product(range(2), range(2), range(32)):
        for k, register, element in itertools.product(range(4), range(4), range(2)):
            row, column = fragment(lane, register, element)
            found = packed[tile, block, k * 256 + lane * 8 + register * 2 + element]
            assert found == weight[tile * 16 + row, block * 64 + k * 16 + column]


def test_every_place_of_a_fragment_is_held_once() -> None:
    held = {fragment(*at) for at in itertools.product(range(32), range(4), range(2))}
    assert held == set(itertools.product(range(16), range(16)))


def test_a_lane_finds_the_scales_of_its_two_outputs_side_by_side() -> None:
    scales = torch.rand(48, 8)
    packed = packing.pack_scales(scales)
    assert packed.shape == (3, 2, 16, 4)
    for tile, output, block in itertools.product(range(3), range(16), range(8)):
        at = output % 8 * 2 + output // 8  # g, then its half
        assert packed[tile, block // 4, at, block % 4] == scales[tile * 16 + output, block]
    rows = packing.pack_rows(scales)
    assert rows.shape == (3, 8, 16)
    assert torch.equal(rows[1, 5, 0::2], scales[16:24, 5])
    assert torch.equal(rows[1, 5, 1::2], scales[24:32, 5])


@given(rows=st.integers(1, 70), columns=st.integers(1, 70), multiple=st.sampled_from((4, 64, 128)))
def test_padding_is_zero_and_no_more_than_needed(rows: int, columns: int, multiple: int) -> None:
    value = torch.ones(rows, columns, dtype=torch.uint8)
    for padded, axis in ((packing.pad_rows, 0), (packing.pad_inputs, 1)):
        found = padded(value, multiple)
        assert found.shape[axis] % multiple == 0
        assert 0 <= found.shape[axis] - value.shape[axis] < multiple
        assert found.shape[1 - axis] == value.shape[1 - axis]
        assert torch.equal(found[:rows, :columns], value) and found.sum() == rows * columns


def test_gate_and_up_meet_in_one_tile() -> None:
    inner = 40
    rows = torch.arange(2 * inner).view(-1, 1)
    mixed = packing.interleave(rows, gated=True)
    for tile in range(inner // 8):
        found = mixed[tile * 16 : tile * 16 + 16, 0].tolist()
        gate = list(range(tile * 8, tile * 8 + 8))
        assert found == gate + [row + inner for row in gate]
    assert torch.equal(packing.deinterleave(mixed, gated=True), rows)
    assert packing.interleave(rows, gated=False) is rows
    assert packing.deinterleave(rows, gated=False) is rows


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 64), (96, 576), (208, 1536)])
def test_an_operand_holds_the_codes_of_its_parts(outputs: int, inputs: int, gated: bool) -> None:
    parts = [random_nf4(outputs, inputs, nested=False) for _ in range(2)]
    operand = place().prepare_nf4(parts, None, gated=gated)
    rows = packing.unpack_codes(operand.weight)
    assert rows.shape[0] % operand.tiling.rows == 0
    assert rows.shape[1] % linear.STAGE_BYTES == 0
    assert not rows[2 * outputs :].any() and not rows[:, inputs // 2 :].any()
    codes = packing.deinterleave(rows[: 2 * outputs, : inputs // 2], gated=gated)
    assert torch.equal(codes.flatten(), torch.cat([part.packed for part in parts]))
    assert operand.scale is not None
    scales = unpack_scales(operand.scale)[: 2 * outputs, : inputs // 64]
    expected = torch.cat([part.expanded() for part in parts]).view(2 * outputs, -1)
    assert torch.equal(packing.deinterleave(scales, gated=gated), expected)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(48, 512), (64, 1536), (80, 4096), (32, 14336), (16, 28672)]
)
def test_nested_scales_are_recomputed_to_the_bit(outputs: int, inputs: int, gated: bool) -> None:
    parts = [random_nf4(outputs, inputs, nested=True) for _ in range(2)]
    operand = place().prepare_nf4(parts, None, gated=gated)
    assert operand.kind == KIND_NESTED and operand.nested is not None
    nested, blocks = operand.nested, inputs // 64
    assert operand.scale is nested.indexes
    index = unpack_scales(nested.indexes)[:, :blocks].long()
    # lanes hold outputs g and g + 8 side by side; a span shares one outer scale
    outer = unpack_rows(nested.outer).repeat_interleave(1 << nested.span_shift, dim=1)
    offset = unpack_rows(nested.offset[:, None])
    scales = dynamic_map()[index] * outer[:, :blocks] + offset

    expected = torch.cat([part.expanded() for part in parts]).view(2 * outputs, blocks)
    assert torch.equal(packing.deinterleave(scales[: 2 * outputs], gated=gated), expected)


def test_scales_that_cannot_stay_nested_are_expanded() -> None:
    odd = place().prepare_nf4([random_nf4(64, 576, nested=True)], None)  # 9 blocks a row
    assert (odd.kind, odd.nested) == (KIND_F32, None)
    other_map = random_nf4(64, 4096, nested=True, code=dynamic_map() * 0.5)
    parts = [random_nf4(64, 4096, nested=True), other_map]
    mixed = place().prepare_nf4(parts, None)
    assert (mixed.kind, mixed.nested) == (KIND_F32, None)
    assert mixed.scale is not None
    expected = torch.cat([part.expanded() for part in parts]).view(128, -1)
    assert torch.equal(unpack_scales(mixed.scale), expected)


@pytest.mark.parametrize(
    ("blocks", "span"), [(9, 1), (24, 8), (64, 64), (224, 32), (256, 256), (512, 256)]
)
def test_a_span_divides_rows_and_lies_in_one_nested_block(blocks: int, span: int) -> None:
    part = random_nf4(16, blocks * 64, nested=True)
    assert packing.nested_span([part, part], blocks) == span
    assert packing.nested_span([part, random_nf4(16, blocks * 64, nested=False)], blocks) == 0
    starts = torch.arange(0, 16 * blocks, span)
    assert torch.equal(starts // 256, (starts + span - 1) // 256)


@pytest.mark.parametrize("sizes", [(96,), (64, 32), (64, 16, 16)])
def test_slices_end_where_their_parts_do(sizes: tuple[int, ...]) -> None:
    ends = [*itertools.accumulate(sizes), 96, 96]
    assert linear._slices(sizes) == (ends[0], ends[1])


@pytest.mark.parametrize("gated", [False, True])
def test_a_dense_operand_holds_its_weights(gated: bool) -> None:
    weights = [torch.randn(72, 576).bfloat16() for _ in range(2)]
    operand = place().prepare_dense(weights, None, gated=gated)
    assert operand.kind == KIND_BF16
    rows = packing.unpack_bf16(operand.weight)[: operand.outputs, : operand.inputs]
    assert torch.equal(packing.deinterleave(rows, gated=gated), torch.cat(weights))
    assert operand.weight.count_nonzero() == torch.cat(weights).count_nonzero()


def test_shapes_that_the_kernels_cannot_take_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        place().prepare_dense([torch.zeros(64, 96)], None)
    with pytest.raises(ValueError, match="40 x 64"):
        place().prepare_dense([torch.zeros(40, 64)], None, gated=True)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_tiling_fills_the_card_as_far_as_the_shape_goes(
    outputs: int, inputs: int, card: str
) -> None:
    num_sms, clusters = CARDS[card]
    cut = tiling.choose(outputs, inputs, num_sms, clusters=clusters, is_wide=card == "H100")
    blocks = -(-outputs // cut.rows) * cut.cluster
    assert cut.cluster == 1 or clusters
    assert cut.rows % (16 * cut.cluster) == 0, "a block of a cluster finishes whole tiles"
    assert inputs // 64 >= cut.cluster * tiling.STAGE_BLOCKS or cut.cluster == 1
    assert cut.threads <= 1024 and cut.threads * cut.min_blocks <= 2048
    small = outputs < num_sms * tiling.GROUP_ROWS / 3
    short = inputs // 64 < 32 * cut.cluster
    assert 3 * blocks >= 2 * num_sms or not clusters or small or short or cut.cluster == 4


@given(
    outputs=st.integers(1, 300_000),
    blocks=st.integers(1, 512),
    num_sms=st.integers(16, 256),
    card=st.sampled_from(["A100", "B200", "H100"]),
)
def test_any_shape_has_a_tiling(outputs: int, blocks: int, num_sms: int, card: str) -> None:
    clusters, is_wide = CARDS[card][1], card == "H100"
    cut = tiling.choose(outputs, blocks * 64, num_sms, clusters=clusters, is_wide=is_wide)
    assert cut.cluster in (1, 2, 4) and cut.rows % (16 * cut.cluster) == 0
    assert cut.cluster == 1 or blocks >= 32 * cut.cluster // 2
    for kind, tiles in itertools.product(KINDS, tiling.TOKEN_TILES):
        ring = tiling.ring_of(cut, kind, tiles, HOPPER_SMEM, is_wide=is_wide)
        assert ring is not None and cut.smem(kind, tiles, ring) <= HOPPER_SMEM


@pytest.mark.parametrize("tiles", [n for n in tiling.TOKEN_TILES if n <= tiling.MOST_TILES])
def test_two_blocks_share_a_multiprocessor_where_the_code_counts_on_it(tiles: int) -> None:
    cut = tiling.choose(128256, 4096, 132, clusters=True, is_wide=True, is_nf4=False)
    assert cut.min_blocks == 2
    for ends in (
        None,
        tiling.ends_of(cut, tiling.KIND_BF16, 4096, tiles, HOPPER_SMEM, is_wide=True),
    ):
        ring = tiling.ring_of(cut, tiling.KIND_BF16, tiles, HOPPER_SMEM, ends, is_wide=True)
        assert ring is not None
        assert 2 * (cut.smem(tiling.KIND_BF16, tiles, ring, ends) + 1024) <= 228 << 10
        assert tiling.STAGE_BLOCKS % ring.blocks == 0 and ring.stages >= 2


@pytest.mark.parametrize(
    ("grid", "cluster", "helpers"),
    [((1, 1, 112), 1, 20), ((1, 2, 112), 1, 0), ((2, 1, 64), 2, 0), ((1, 1, 200), 1, 0)],
)
def test_multiprocessors_without_outputs_multiply_for_the_others(
    grid: tuple[int, int, int], cluster: int, helpers: int
) -> None:
    """Unless other blocks of the launch need them, or blocks come in clusters."""
    params, cut = Params(K=4096), tiling.Tiling(4, 1, cluster)
    found = place()._with_helpers(params, grid, cut, tiling.Ends(0, 64, 2, keeps_table=True))
    assert found == (*grid[:2], grid[2] + helpers)
    assert params.helpers == helpers


@pytest.mark.parametrize(("inputs", "beside", "rounds"), [(8192, 0, 8), (8192, 8, 2), (512, 4, 1)])
def test_a_helper_makes_no_more_units_than_there_is_time_for(
    inputs: int, beside: int, rounds: int
) -> None:
    params, ends = Params(K=inputs), tiling.Ends(beside, 64, 1, keeps_table=True)
    place()._with_helpers(params, (1, 1, 128), tiling.Tiling(1, 4, 1), ends)
    assert params.rounds == rounds


def test_blocks_that_others_wait_for_are_resident() -> None:
    """On an H200 fewer than 32 clusters of four find room at once, on none fewer than 16."""
    found = {size: tiling.resident_blocks(tiling.Tiling(1, 4, size), 132) for size in (1, 2, 4)}
    assert found == {1: 132, 2: 132, 4: 64}
    assert tiling.resident_blocks(tiling.Tiling(1, 4, 4), 7) == 4


@pytest.mark.parametrize("card", CARDS)
def test_adapters_fit_the_shared_memory_of_each_card(card: str) -> None:
    """Few rows leave room for warps beside the main ones, where those multiply by four."""
    (num_sms, clusters), most, is_wide = CARDS[card], MAX_SMEM[card], card == "H100"
    for (outputs, inputs), rows in itertools.product(SHAPES, (1, 16, 17, 64, 128)):
        cut = tiling.choose(outputs, inputs, num_sms, clusters=clusters, is_wide=is_wide)
        tiles = tiling.token_tiles_of(cut, tiling.KIND_NESTED, rows, most, is_wide=is_wide)
        ends = tiling.ends_of(cut, tiling.KIND_NESTED, inputs, tiles, most, is_wide=is_wide)
        ring = tiling.ring_of(cut, tiling.KIND_NESTED, tiles, most, ends, is_wide=is_wide)
        assert ring and cut.smem(tiling.KIND_NESTED, tiles, ring, ends) <= most
        few = is_wide and cut.min_blocks == 1 and tiles <= tiling.BESIDE_TILES
        assert bool(ends.beside) == few


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", tiling.TOKEN_TILES)
def test_on_hopper_weights_come_through_shared_memory(tiles: int, kind: int) -> None:
    """But for dense ones, and where groups have an x each that leaves them no room."""
    for inputs, outputs in ((4096, 28672), (4096, 4096), (14336, 4096)):
        cut = tiling.choose(outputs, inputs, 132, clusters=True, is_wide=True)
        ring = tiling.ring_of(cut, kind, tiles, HOPPER_SMEM, is_wide=True)
        full = cut.input_groups > 1 and tiles > 3
        assert ring and bool(ring.weights) == (kind != tiling.KIND_BF16 and not full)
        other = tiling.ring_of(cut, kind, min(tiles, 8), HOPPER_SMEM, is_wide=False)
        assert other and not other.weights


@pytest.mark.parametrize(
    ("outputs", "groups"), [(28672, 4), (22016, 3), (19456, 3), (57344, 4), (16960, 3)]
)
def test_multiprocessors_have_as_few_outputs_as_can_be(outputs: int, groups: int) -> None:
    cut = tiling.choose(outputs, 4096, 132, clusters=True, is_wide=True)
    assert cut == tiling.Tiling(groups, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", tiling.TOKEN_TILES)
def test_threads_copy_whole_rows_of_x(tiles: int, kind: int) -> None:
    """Where they do: on Hopper boxes are copied."""
    for cut in {tiling.choose(*shape, 132, clusters=True, is_wide=False) for shape in SHAPES}:
        ring = tiling.ring_of(cut, kind, tiles, HOPPER_SMEM, is_wide=False)
        assert ring is not None
        assert cut.threads % (cut.input_groups * ring.blocks * 8) == 0


@pytest.mark.parametrize("card", CARDS)
def test_every_step_fits_the_shared_memory_of_each_card(card: str) -> None:
    (num_sms, clusters), most = CARDS[card], MAX_SMEM[card]
    for shape, kind, rows in itertools.product(SHAPES, KINDS, (1, 8, 9, 33, 64, 65, 256)):
        is_wide = card == "H100"
        cut = tiling.choose(*shape, num_sms, clusters=clusters, is_wide=is_wide)
        tiles = tiling.token_tiles_of(cut, kind, rows, most, is_wide=is_wide)
        ring = tiling.ring_of(cut, kind, tiles, most, is_wide=is_wide)
        assert ring is not None and cut.smem(kind, tiles, ring) <= most, (shape, kind, rows)
        wide = is_wide and kind != tiling.KIND_BF16
        larger = [n for n in tiling.TOKEN_TILES if n > tiles and (wide or n <= tiling.MOST_TILES)]
        fit = [n for n in larger if tiling.ring_of(cut, kind, n, most, is_wide=is_wide)]
        assert tiles * 8 >= rows or not fit
        assert most < HOPPER_SMEM or tiles * 8 >= min(rows, 64)


def test_in_the_tables_unit_bf16_holds_nf4_better() -> None:
    """Of normally distributed weights; the kernels multiply values by one number and sums by the
    other."""
    packed = quantize_nf4(torch.randn(1024, 1024), double_quant=False).packed
    codes = torch.stack((packed >> 4, packed & 15)).flatten().long()
    exact = nf4_code().double()[codes]

    def error(unit: float, back: float) -> float:
        table = (unit * nf4_code()).bfloat16().double() * back
        return float((table[codes] - exact).norm() / exact.norm())

    assert error(CODE_UNIT, SUM_UNIT) < 0.8e-3 < 1.3e-3 < error(1, 1)


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """[tiles, C, 16] -> [N, C]."""
    tiles, columns = packed.shape[:2]
    return packed.view(tiles, columns, 8, 2).permute(0, 3, 2, 1).reshape(tiles * 16, columns)


def unpack_scales(packed: torch.Tensor) -> torch.Tensor:
    """[tiles, KB / 4, 16, 4] -> [N, KB]."""
    return unpack_rows(packed.transpose(2, 3).reshape(len(packed), -1, 16))
