"""The CPU backend computes what `reference.py` says, over popularity x rank x odd sizes."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import isfunction

import pytest
import torch
from torch import Tensor

from loriner.kernels import native, reference
from loriner.kernels.operands import AttentionPlan, LoraGroup, LoraPart, Segment

if native.library() is None:
    pytest.skip("no C compiler on this machine", allow_module_level=True)

from loriner.kernels import cpu

cpu.start(2)

POPULARITY = ("distinct", "uniform", "identical", "skewed")


def segment_lengths(popularity: str, num_rows: int) -> list[int]:
    if popularity == "distinct":
        return [1] * num_rows
    if popularity == "identical":
        return [num_rows]
    if popularity == "uniform":
        return [len(c) for c in torch.arange(num_rows).chunk(max(1, int(num_rows**0.5)))]
    lengths, left = [], num_rows
    while left:
        lengths.append(max(1, left // 2))
        left -= lengths[-1]
    return lengths


def random_group(
    ranks: Sequence[int], sizes: Sequence[int], inputs: int, bias: bool, dtype: torch.dtype
) -> LoraGroup:
    """One adapter on a fused linear whose slices have `sizes`; rank 0 leaves a slice out."""
    parts, row, offset = [], 0, 0
    for rank, size in zip(ranks, sizes, strict=True):
        if rank:
            b = torch.randn(rank, size)
            shift = torch.randn(size) if bias else None
            parts.append(LoraPart(offset, row, row + rank, b.to(dtype), 0.5 + offset, shift))
            row += rank
        offset += size
    return LoraGroup((torch.randn(row, inputs) / inputs**0.5).to(dtype), tuple(parts))


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 33, 150])
@pytest.mark.parametrize("base_rows", [0, 3])
@pytest.mark.parametrize("make", ["nf4", "bf16", "dense"])
def test_linear_with_adapters_equals_the_reference(
    popularity: str, num_rows: int, base_rows: int, make: str
) -> None:
    torch.manual_seed(num_rows)
    sizes, inputs = (75, 16, 5), 192
    choices = [(8, 8, 8), (1, 0, 4), (0, 24, 0), (64, 3, 16), (256, 0, 0)]
    segments, start = [], 0
    for i, length in enumerate(segment_lengths(popularity, num_rows)):
        dtype = torch.bfloat16 if i % 2 else torch.float32
        group = random_group(choices[i % len(choices)], sizes, inputs, i % 3 == 0, dtype)
        segments.append(Segment(start, start + length, group))
        start += length
    weight = random_nf4(sum(sizes), inputs)
    dense = reference.dequantize_nf4(*weight)
    operand = {
        "nf4": lambda: cpu.prepare_nf4(*weight, None),
        "bf16": lambda: cpu.prepare_dense(dense.bfloat16(), None),
        "dense": lambda: cpu.prepare_dense(dense, None),
    }[make]()
    if make == "bf16":
        dense = dense.bfloat16().float()
    x = torch.randn(num_rows + base_rows, inputs)
    expected = reference.linear(x, reference.prepare_dense(dense, None), segments)
    got = cpu.linear(x, operand, cpu.prepare_lora(segments, num_rows + base_rows))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-3)
    if make != "dense" and base_rows:
        assert torch.equal(got[num_rows:], cpu.linear(x, operand)[num_rows:])


ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 129]


def random_nf4(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    packed = torch.randint(0, 256, (outputs * inputs // 2,), dtype=torch.uint8)
    absmax = torch.rand(outputs * inputs // 64) * 0.1
    return packed, absmax, torch.linspace(-1, 1, 16), (outputs, inputs)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 64), (33, 192), (96, 576), (200, 128)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_nf4_linear_is_fp32(num_rows: int, outputs: int, inputs: int, with_bias: bool) -> None:
    torch.manual_seed(outputs)
    weight = random_nf4(outputs, inputs)
    bias = torch.randn(outputs) if with_bias else None
    x = torch.randn(num_rows, inputs)
    exact = x.double() @ reference.dequantize_nf4(*weight).double().t()
    exact += 0 if bias is None else bias.double()
    got = cpu.linear(x, cpu.prepare_nf4(*weight, bias))
    assert (got - exact).abs().max() < 2e-5


@pytest.mark.parametrize("num_rows", ROWS)
def test_bf16_linear_is_fp32(num_rows: int) -> None:
    torch.manual_seed(0)
    weight, bias = (torch.randn(97, 208) * 0.05).bfloat16(), torch.randn(97)
    x = torch.randn(num_rows, 208)
    exact = x.double() @ weight.double().t() + bias.double()
    operand = cpu.prepare_dense(weight, bias)
    assert isinstance(operand, cpu.Bf16)
    assert (cpu.linear(x, operand) - exact).abs().max() < 2e-5


@pytest.mark.parametrize("make", ["nf4", "bf16"])
def test_linear_of_a_row_does_not_depend_on_its_neighbours(make: str) -> None:
    torch.manual_seed(0)
    operand = (
        cpu.prepare_nf4(*random_nf4(96, 576), None)
        if make == "nf4"
        else cpu.prepare_dense(torch.randn(96, 576).bfloat16(), None)
    )
    x = torch.randn(33, 576)
    together = cpu.linear(x, operand)
    for row in range(33):
        assert torch.equal(together[row : row + 1], cpu.linear(x[row : row + 1].clone(), operand))


def test_what_the_c_code_cannot_take_is_computed_by_torch() -> None:
    for weight in (torch.randn(4, 25), torch.randn(4, 25).half(), torch.randn(4, 25).bfloat16()):
        operand = cpu.prepare_dense(weight, None)
        assert isinstance(operand, reference.Dense)
        torch.testing.assert_close(cpu.linear(torch.eye(25), operand), weight.float().t())


def attention_case(
    num_heads: int, num_kv: int, dim: int, size: int = 4
) -> tuple[Tensor, Tensor, Tensor, AttentionPlan]:
    """Rows of a short, a decoding, a chunked and a long sequence, in scattered blocks of `size`."""
    torch.manual_seed(1)
    rows, starts = [1, 1, 5, 40], [0, 8, 4, 0]
    k, v = torch.randn(40, num_kv, dim, size), torch.randn(40, num_kv, size, dim)
    blocks = torch.randperm(40).to(torch.int32)[: 4 * 10].view(4, 10)
    spans, sequence, context = [], [], []
    for i, (count, start) in enumerate(zip(rows, starts, strict=True)):
        spans.append((len(sequence), len(sequence) + count))
        sequence += [i] * count
        context += range(start + 1, start + count + 1)
    plan = AttentionPlan(
        tuple(spans),
        blocks,
        torch.tensor(sequence, dtype=torch.int32),
        torch.tensor(context, dtype=torch.int32),
    )
    return torch.randn(sum(rows), num_heads + 3, dim)[:, :num_heads], k, v, plan


@pytest.mark.parametrize(
    ("num_heads", "num_kv", "dim"), [(4, 4, 16), (6, 2, 64), (5, 1, 80), (16, 1, 256)]
)
@pytest.mark.parametrize("size", [4, 16, 24, 32])
def test_paged_attention_equals_the_reference(
    num_heads: int, num_kv: int, dim: int, size: int
) -> None:
    q, k, v, plan = attention_case(num_heads, num_kv, dim, size)
    got = cpu.paged_attention(q, k, v, plan, dim**-0.5)
    expected = reference.paged_attention(q, k, v, plan, dim**-0.5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_paged_attention_reads_nothing_beyond_the_context() -> None:
    q, k, v, plan = attention_case(4, 2, 16)
    expected = cpu.paged_attention(q, k, v, plan, 0.25)
    visible = torch.zeros(40, 4, dtype=torch.bool)
    for i, (_, end) in enumerate(plan.spans):
        for position in range(int(plan.context[end - 1])):
            visible[plan.blocks[i, position // 4], position % 4] = True
    k.masked_fill_(~visible[:, None, None, :], torch.nan)
    v.masked_fill_(~visible[:, None, :, None], torch.nan)
    assert torch.equal(cpu.paged_attention(q, k, v, plan, 0.25), expected)


def test_a_row_of_nan_stays_alone() -> None:
    q, k, v, plan = attention_case(4, 2, 16)
    expected = cpu.paged_attention(q, k, v, plan, 0.25)
    q = q.clone()
    q[1] = torch.nan
    got = cpu.paged_attention(q, k, v, plan, 0.25)
    assert torch.isnan(got[1]).all()
    assert torch.equal(got[2:], expected[2:]) and torch.equal(got[0], expected[0])


def test_large_scores_do_not_overflow() -> None:
    q, k, v, plan = attention_case(4, 2, 16)
    got = cpu.paged_attention(q * 300, k, v, plan, 1.0)
    expected = reference.paged_attention(q * 300, k, v, plan, 1.0)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_small_ops_equal_the_reference() -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(5, 3, 16), torch.randn(48)
    torch.testing.assert_close(
        cpu.rms_norm(x.flatten(1), weight, 1e-5), reference.rms_norm(x.flatten(1), weight, 1e-5)
    )
    cos, sin = torch.randn(5, 1, 16), torch.randn(5, 1, 16)
    torch.testing.assert_close(cpu.rope(x, cos, sin), reference.rope(x, cos, sin))
    torch.testing.assert_close(cpu.rope(x[:, :2], cos, sin), reference.rope(x[:, :2], cos, sin))
    gate_up = torch.cat((torch.randn(5, 34) * 30, torch.tensor([[-200.0, 200.0]]).expand(5, 2)), 1)
    torch.testing.assert_close(cpu.silu_mul(gate_up), reference.silu_mul(gate_up))


def test_store_kv_equals_the_reference() -> None:
    qkv = torch.randn(5, 7, 8)
    slots = torch.tensor([3, 0, 11, 4, 9])
    mine = torch.zeros(3, 2, 8, 4), torch.zeros(3, 2, 4, 8)
    theirs = torch.zeros(3, 2, 8, 4), torch.zeros(3, 2, 4, 8)
    cpu.store_kv(qkv[:, 3:5], qkv[:, 5:], *mine, slots)
    reference.store_kv(qkv[:, 3:5], qkv[:, 5:], *theirs, slots)
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


def test_every_backend_has_the_names_of_the_reference() -> None:
    names = {
        name
        for name, value in vars(reference).items()
        if isfunction(value) and value.__module__ == reference.__name__ and name[0] != "_"
    }
    assert names == set(cpu.__all__)
