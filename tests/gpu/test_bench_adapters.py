"""Adapted linears as `bench kernels` calls them, without an engine, against float64."""

from __future__ import annotations

import pytest
import torch

from loriner.bench.kernel_ops import LINEARS, Fused, Surface, dequantized
from loriner.bench.random_adapters import RandomAdapters
from loriner.bench.random_base import RandomBase
from loriner.bench.seated import call_adapters
from tests.gpu.operands import error

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

ROWS, LAYER = 9, 1


@pytest.mark.parametrize("fused", LINEARS, ids=lambda fused: fused.name)
def test_every_row_is_on_its_adapter(fused: Fused) -> None:
    base = RandomBase("smollm2", "cuda", seed=1)
    adapters, surface = RandomAdapters(base.config, (8, 16, 5)), Surface(base, 1)
    outputs, inputs = fused.shape(base)
    x = surface.random(ROWS, inputs)
    residual = surface.residual(fused, ROWS, outputs)
    before = 0.0 if residual is None else residual.double()
    calls = call_adapters(surface, base.config, adapters, fused, range(LAYER + 1), ROWS)
    weights = fused.weights(base, LAYER)
    operand = surface.prepare(fused, weights)

    found = surface.launch(fused, x, operand, residual, calls.operands[LAYER]).double() - before

    product = x.double() @ dequantized(weights, torch.float64).t()
    names = [f"model.layers.{LAYER}.{member}" for member in fused.members]
    for row in range(ROWS):
        own = [adapters.adapter(row).modules[name] for name in names]
        product[row] += torch.cat(
            [
                one.scaling
                * (x[row].double() @ one.a.cuda().double().t() @ one.b.cuda().double().t())
                for one in own
            ]
        )
    assert error(found, surface.expected(fused, product)) < 4e-3
