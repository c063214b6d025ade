"""The base's linears on the GPU against float64: kinds of weight, ends, odd sizes, rows, graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from loriner.kernels.cuda import packing
from tests.gpu.conftest import ROWS
from tests.gpu.operands import EXACT_ROWS, acted, alone_and_replayed, dense, error, random_nf4

pytestmark = pytest.mark.gpu

SHAPES = ((576, 576), (960, 576), (576, 1536), (1040, 2048), (4096, 4096), (4096, 14336))
TOLERANCE = 1e-3  # f32 out; the table is bf16
BF16_OUT = 2e-3  # the output is rounded once more
MANY_ROWS = 3.2e-3  # weights, in their own scale, and the product are bf16
GATED, MANY_GATED = 2.5e-3, 6e-3


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_nf4_linear_equals_float64(kernels: Any, outputs: int, inputs: int, nested: bool) -> None:
    weight = random_nf4(outputs, inputs, nested=nested)
    exact, bias = dense(weight), torch.randn(outputs)
    operand = kernels.prepare_nf4([weight], bias)

    for rows in ROWS:
        x = torch.randn(rows, inputs, device="cuda").bfloat16()
        h, before = torch.randn(2, rows, outputs, device="cuda")

        def add(x: Tensor = x, h: Tensor = h, before: Tensor = before) -> Tensor:
            torch.add(before, 0, out=h)
            return kernels.linear_add(h, x, operand) - before  # type: ignore[no-any-return]

        added, stored = (TOLERANCE, BF16_OUT) if rows <= EXACT_ROWS else (MANY_ROWS, MANY_ROWS)
        runs = ((partial(kernels.logits, x, operand), TOLERANCE), (add, added))
        for run, most in (*runs, (partial(kernels.linear, x, operand), stored)):
            for found in alone_and_replayed(run, x):
                expected = x.double() @ exact.t() + bias.double().cuda()
                assert error(found, expected) < most, rows


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("inner", "inputs"),
    [(1536, 576), (1000, 2048), (14336, 4096), (9728, 2560), (8512, 64), (8512, 320)],
)
def test_gated_linear_equals_float64(kernels: Any, inner: int, inputs: int, act: str) -> None:
    gate, up = (random_nf4(inner, inputs, nested=inputs == 4096) for _ in range(2))
    operand = kernels.prepare_nf4([gate, up], None, gated=True)

    for rows in (1, 8, 33, 64, 129, 513):
        x = (torch.randn(rows, inputs, device="cuda") / 4).bfloat16()
        for found in alone_and_replayed(partial(kernels.linear_gated, x, operand, None, act), x):
            both = x.double() @ torch.cat([dense(gate), dense(up)]).t()
            limit = GATED if rows <= EXACT_ROWS else MANY_GATED
            assert error(found, acted(both, act)) < limit, rows


@pytest.mark.parametrize(("outputs", "inputs"), [(1000, 576), (49152, 576), (32000, 4096)])
def test_dense_linear_equals_float64(kernels: Any, outputs: int, inputs: int) -> None:
    weight = torch.randn(outputs, inputs, device="cuda").bfloat16()
    operand = kernels.prepare_dense([weight], None)

    for rows in (1, 7, 8, 33, 64, 128, 255):
        x = torch.randn(rows, inputs, device="cuda").bfloat16()
        for found in alone_and_replayed(partial(kernels.logits, x, operand), x):
            assert error(found, x.double() @ weight.double().t()) < 1e-5, rows


def test_a_row_does_not_depend_on_the_rows_beside_it(kernels: Any) -> None:
    for outputs, inputs in ((960, 576), (4096, 4096), (28672, 4096), (19456, 2560)):
        operand = kernels.prepare_nf4([random_nf4(outputs, inputs, nested=True)], None)
        x = torch.randn(256, inputs, device="cuda").bfloat16()
        alone = torch.cat([kernels.logits(x[i : i + 1], operand) for i in range(0, 256, 17)])
        for rows in (2, 8, 9, 17, 33, 48, 64, 100, 128, 256):
            together = kernels.logits(x[:rows].contiguous(), operand)[::17]
            assert torch.equal(together, alone[: len(together)]), (outputs, rows)


@pytest.mark.parametrize("gated", [False, True])
def test_a_kept_weight_changes_no_bit(
    kernels: Any, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [random_nf4(1040, 2048, nested=True) for _ in range(2)]
    operand = kernels.prepare_nf4(parts, torch.randn(2080), gated=gated)
    x = torch.randn(300, 2048, device="cuda").bfloat16()
    run = partial(kernels.linear_gated, x, operand, None, "silu")
    run = run if gated else partial(kernels.linear, x, operand)
    made = run()

    assert kernels.keep_bf16(operand) == 2 * 2080 * 2048
    monkeypatch.delattr(type(kernels.many_rows), "dequantized")

    assert torch.equal(run(), made)


def test_dequantised_weights_are_those_that_are_stored(kernels: Any) -> None:
    for nested, gated in ((False, False), (True, False), (False, True), (True, True)):
        inputs = 2048 if nested else 576
        parts = [random_nf4(1040, inputs, nested=nested) for _ in range(2)]
        operand = kernels.prepare_nf4(parts, None, gated=gated)
        expected = torch.cat([dense(part) for part in parts]).bfloat16()
        found = kernels.many_rows.dequantized(operand)
        assert error(found, expected.double()) < 1e-3


def test_packing_round_trips_on_the_gpu() -> None:
    packed = torch.randint(0, 256, (96, 256), device="cuda", dtype=torch.uint8)
    assert torch.equal(packing.unpack_codes(packing.pack_codes(packed)), packed)
