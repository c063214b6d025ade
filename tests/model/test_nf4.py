"""The NF4 encoder against bitsandbytes, bit for bit."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from loriner.kernels.operands import NestedScales
from loriner.kernels.reference import dequantize_nf4
from loriner.model import nf4
from loriner.model.nf4 import dynamic_map, nf4_code, quantize_nf4

bnb: Any = pytest.importorskip("bitsandbytes.functional")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 64), (3, 64), (96, 192), (192, 576), (300, 128))


def random_weight(shape: tuple[int, int], scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def oracle(weight: Tensor, *, nested: bool = False) -> tuple[Tensor, Any]:
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    return packed.flatten(), state


def strange_weights() -> dict[str, Tensor]:
    """Values at which rounding, ties, zero blocks or tiny scales could go another way."""
    code = nf4_code()
    ties = torch.zeros(2, 64)
    ties[:, :15] = (code[:-1] + code[1:]) / 2
    ties[:, 63] = 1.0
    ties[1] *= 0.37
    zeros = random_weight((8, 128))
    zeros[::2] = 0.0
    return {
        "ties": ties,
        "zero blocks": zeros,
        "all zero": torch.zeros(4, 64),
        "negative zero": torch.full((2, 64), -0.0),
        "denormal": torch.full((2, 64), 1e-40),
        "tiny": random_weight((4, 64), 1e-37),
        "huge": random_weight((4, 64), 1e37),
        "one outlier": torch.cat((torch.full((1, 63), 1e-3), torch.tensor([[500.0]])), dim=1),
        "constant": torch.full((4, 64), 0.25),
        "the code itself": code.repeat(4, 4),
    }


def test_tables_are_those_of_bitsandbytes() -> None:
    assert torch.equal(nf4_code(), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 0.02, 3.0])
def test_packed_bytes_and_scales_equal_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, scale: float
) -> None:
    weight = random_weight(shape, scale).to(dtype)
    ours, (packed, state) = quantize_nf4(weight, double_quant=False), oracle(weight)

    assert torch.equal(ours.packed, packed)
    assert torch.equal(ours.expanded(), state.absmax)


@pytest.mark.parametrize("name", strange_weights())
def test_strange_values_equal_bitsandbytes(name: str) -> None:
    weight = strange_weights()[name]
    ours, (packed, state) = quantize_nf4(weight, double_quant=False), oracle(weight)

    assert torch.equal(ours.packed, packed)
    assert torch.equal(ours.expanded(), state.absmax)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 0.02, 3.0])
def test_nested_scales_equal_bitsandbytes_around_the_same_offset(
    shape: tuple[int, int], scale: float
) -> None:
    weight = random_weight(shape, scale).bfloat16()
    ours, (packed, state) = quantize_nf4(weight, double_quant=True), oracle(weight)
    nested = ours.absmax
    assert isinstance(nested, NestedScales)
    index, scales = bnb.quantize_blockwise(
        state.absmax - torch.tensor(nested.offset), blocksize=256
    )

    assert torch.equal(ours.packed, packed)
    assert torch.equal(nested.index, index)
    assert torch.equal(nested.absmax, scales.absmax)
    assert torch.equal(nested.code, scales.code)


@pytest.mark.parametrize("shape", SHAPES)
def test_nested_weights_whose_mean_is_exact_equal_bitsandbytes_in_every_part(
    shape: tuple[int, int],
) -> None:
    """Scales are small multiples of 1/8, a power of two of them: no order of summing rounds."""
    rows, cols = 2 ** (shape[0].bit_length()), 2 ** (shape[1].bit_length())
    weight = (random_weight((rows, cols), 4.0) * 8).round() / 8
    ours, (packed, state) = quantize_nf4(weight, double_quant=True), oracle(weight, nested=True)
    nested = ours.absmax
    assert isinstance(nested, NestedScales)

    assert nested.offset == state.offset.item()
    assert torch.equal(ours.packed, packed)
    assert torch.equal(nested.index, state.absmax)
    assert torch.equal(nested.absmax, state.state2.absmax)


@pytest.mark.parametrize("seed", range(5))
def test_offset_is_within_rounding_of_bitsandbytes(seed: int) -> None:
    weight = random_weight((192, 576), 0.02, seed).bfloat16()
    nested = quantize_nf4(weight, double_quant=True).absmax
    assert isinstance(nested, NestedScales)
    offset = oracle(weight, nested=True)[1].offset.item()

    assert abs(nested.offset - offset) <= 2 * torch.finfo(torch.float32).eps * offset


def test_eight_bit_search_equals_bitsandbytes_at_its_cell_borders() -> None:
    code = dynamic_map()
    cells = (torch.arange(65536, dtype=torch.float64) + 0.5) / 32767.5 - 1
    borders = cells.float().clamp(-1, 1)
    nearby = torch.cat((borders, borders.nextafter(torch.tensor(1.0)), code, code.neg()))
    padded = torch.nn.functional.pad(nearby, (0, -len(nearby) % 255)).view(-1, 255)
    values = torch.cat((padded, torch.ones(len(padded), 1)), dim=1).flatten()
    values = torch.cat((values, torch.zeros(300), torch.full((300,), 1e-40)))
    index, scales, _ = nf4._quantize_8bit(values)
    expected, state = bnb.quantize_blockwise(values, blocksize=256)

    assert torch.equal(index, expected)
    assert torch.equal(scales, state.absmax)


@pytest.mark.parametrize("double_quant", [False, True])
def test_decoding_equals_bitsandbytes(double_quant: bool) -> None:
    weight = random_weight((192, 576), 0.02)
    packed, state = oracle(weight, nested=double_quant)
    if double_quant:
        parts = (state.absmax, state.state2.absmax, state.state2.code, state.offset.item())
        absmax = NestedScales(*parts).expand()
    else:
        absmax = state.absmax
    expected = bnb.dequantize_4bit(packed.unsqueeze(1), state)

    assert torch.equal(dequantize_nf4(packed, absmax, nf4_code(), (192, 576)), expected)


def test_large_weights_are_encoded_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight((50, 192))
    whole = quantize_nf4(weight, double_quant=False)
    monkeypatch.setattr(nf4, "PIECE", 7)
    pieces = quantize_nf4(weight, double_quant=False)

    assert torch.equal(whole.packed, pieces.packed)
    assert torch.equal(whole.expanded(), pieces.expanded())


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    weight = random_weight((512, 4096), 0.02).bfloat16()
    one = quantize_nf4(weight, double_quant=True).absmax
    torch.set_num_threads(2)
    two = quantize_nf4(weight, double_quant=True).absmax
    torch.set_num_threads(1)
    assert isinstance(one, NestedScales)
    assert isinstance(two, NestedScales)

    assert one.offset == two.offset
    assert torch.equal(one.index, two.index)


def test_bytes_are_the_same_on_every_machine() -> None:
    """A digest of the base is compared between machines, so the encoder has no bit of freedom."""
    count = torch.arange(96 * 576)
    weight = ((count * 7919 % 10007 - 5003).float() / 5003 * (1 + count // 576)).view(96, 576)
    quantized = quantize_nf4(weight.bfloat16(), double_quant=True)
    nested = quantized.absmax
    assert isinstance(nested, NestedScales)
    parts = (quantized.packed, nested.index, nested.absmax, nested.code)
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()

    assert nested.offset == 47.96409225463867
    assert digest == "ebb4fee54a5a998010d57a610c453b85785f5bebd34b1a083d23a32cf92b29c5"
