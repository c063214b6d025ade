"""Adapters of gated linears on the GPU: against float64, and row by row."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.gpu.operands import (
    Seats,
    acted,
    alone_and_replayed,
    dense,
    error,
    lora_of,
    random_nf4,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [1, 8, 16, 24, 64])
def test_large_gated_rows_without_an_adapter_are_as_if_there_were_none(
    kernels: Any, rows: int
) -> None:
    """Of so many outputs not all thread blocks run at once."""
    inner, inputs = 17408, 1024
    weights = [random_nf4(inner, inputs, nested=True) for _ in range(2)]
    operand, seats = kernels.prepare_nf4(weights, None, gated=True), Seats(1, num_groups=6)
    seats.put(0, 2, inputs, [inner, inner], [16, 16], bias=False)
    x = (torch.randn(rows, inputs, device="cuda") / 8).bfloat16()
    lora = lora_of(kernels, seats, [0] * (rows - 1) + [-1])

    mixed = kernels.linear_gated(x, operand, lora.operand("0.gate_up"), "silu")
    alone = kernels.linear_gated(x, operand, None, "silu")

    assert torch.equal(mixed[-1], alone[-1])
    both = x.double() @ torch.cat([dense(weight) for weight in weights]).t()
    assert error(alone, acted(both)) < 8e-3


@pytest.mark.parametrize(
    ("inner", "inputs"),
    [(256, 576), (264, 576), (9728, 576), (14336, 576), (272, 2048), (512, 4096), (520, 4096)],
)
def test_gated_outputs_of_any_ranks_equal_float64(kernels: Any, inner: int, inputs: int) -> None:
    """Also where A x of few rows does not fit shared memory at once, with biases, and in clusters
    of thread blocks."""
    ranks, damp = [(256, 256), (16, 16), (5, 16), (16, 0), (24, 8)], 8 * (inputs / 576) ** 0.5
    weights = [random_nf4(inner, inputs, nested=False) for _ in range(2)]
    operand = kernels.prepare_nf4(weights, None, gated=True)
    exact = torch.cat([dense(weight) for weight in weights])
    seats = Seats(len(ranks), num_groups=6)
    for seat, pair in enumerate(ranks):
        seats.put(seat, 2, inputs, [inner, inner], list(pair), bias=seat == 4)
    for rows in (5, 16, 64, 300):
        row_seats = sorted(i % len(ranks) for i in range(rows))
        x = (torch.randn(rows, inputs, device="cuda") / damp).bfloat16()
        lora = lora_of(kernels, seats, row_seats).operand("0.gate_up")
        for act in ("silu", "gelu_tanh"):
            for found in alone_and_replayed(
                partial(kernels.linear_gated, x, operand, lora, act), x
            ):
                both = x.double() @ exact.t()
                both += seats.expected(x.double(), row_seats, 2, 2 * inner)
                assert error(found, acted(both, act)) < 8e-3, rows


@pytest.mark.parametrize("ranks", [(0, 16), (16, 0), (0, 64), (48, 16)])
def test_gated_outputs_may_be_adapted_on_one_side(kernels: Any, ranks: tuple[int, int]) -> None:
    """By one adapter, and by one for each row."""
    inner, inputs, num_seats = 9728, 576, 64
    weights = [random_nf4(inner, inputs, nested=False) for _ in range(2)]
    operand = kernels.prepare_nf4(weights, None, gated=True)
    exact = torch.cat([dense(weight) for weight in weights])
    seats = Seats(num_seats, num_groups=6)
    for seat in range(num_seats):
        seats.put(seat, 2, inputs, [inner, inner], list(ranks), bias=False)
    for rows in (1, 8, 16, 64):
        for row_seats in ([0] * rows, list(range(rows))):
            x = (torch.randn(rows, inputs, device="cuda") / 8).bfloat16()
            lora = lora_of(kernels, seats, row_seats).operand("0.gate_up")
            multiply = partial(kernels.linear_gated, x, operand, lora, "silu")
            for found in alone_and_replayed(multiply, x):
                both = x.double() @ exact.t()
                both += seats.expected(x.double(), row_seats, 2, 2 * inner)
                assert error(found, acted(both)) < 8e-3, rows


@pytest.mark.parametrize("inner", [9728, 14336])
def test_half_of_eight_gated_rows_may_have_no_adapter(kernels: Any, inner: int) -> None:
    """The first half or the last, or few rows of either; each other row on its own adapter."""
    inputs, ranks = 576, [(16, 16), (0, 64), (32, 0), (8, 64)]
    weights = [random_nf4(inner, inputs, nested=False) for _ in range(2)]
    operand = kernels.prepare_nf4(weights, None, gated=True)
    exact = torch.cat([dense(weight) for weight in weights])
    seats = Seats(len(ranks), num_groups=6)
    for seat, pair in enumerate(ranks):
        seats.put(seat, 2, inputs, [inner, inner], list(pair), bias=False)
    none = [-1] * 4
    for row_seats in (
        [*none, 0, 1, 2, 3],
        [0, 1, 2, 3, *none],
        [*none, *none],
        [*none, 1, 1, -1],
        [2, *none, 1, -1, 3],
        [*none, -1, 0],
        [1, 1, 1, 1, 3, 3, 3, 3],
    ):
        x = (torch.randn(len(row_seats), inputs, device="cuda") / 8).bfloat16()
        lora = lora_of(kernels, seats, row_seats).operand("0.gate_up")
        for found in alone_and_replayed(partial(kernels.linear_gated, x, operand, lora, "silu"), x):
            both = x.double() @ exact.t()
            both += seats.expected(x.double(), row_seats, 2, 2 * inner)
            assert error(found, acted(both)) < 8e-3, row_seats


def test_many_gated_rows_without_an_adapter_are_as_if_there_were_none(kernels: Any) -> None:
    weights = [random_nf4(576, 1024, nested=True) for _ in range(2)]
    operand, seats = kernels.prepare_nf4(weights, None, gated=True), Seats(1, num_groups=6)
    seats.put(0, 2, 1024, [576, 576], [16, 16], bias=False)
    x = (torch.randn(300, 1024, device="cuda") / 8).bfloat16()
    lora = lora_of(kernels, seats, [0] * 150 + [-1] * 150).operand("0.gate_up")
    for act in ("silu", "gelu_tanh"):
        mixed = kernels.linear_gated(x, operand, lora, act)
        assert torch.equal(mixed[150:], kernels.linear_gated(x, operand, None, act)[150:]), act


def test_a_row_does_not_depend_on_its_neighbours(kernels: Any) -> None:
    sizes, inputs = [14336, 14336], 4096
    weights = [random_nf4(size, inputs, nested=True) for size in sizes]
    operand = kernels.prepare_nf4(weights, None, gated=True)
    seats = Seats(8, num_groups=6)
    for seat in range(8):
        seats.put(seat, 2, inputs, sizes, [16, 16], bias=False)
    x = torch.randn(96, inputs, device="cuda").bfloat16()
    row_seats = sorted(i % 9 - 1 for i in range(96))
    row_seats = [s for s in row_seats if s >= 0] + [s for s in row_seats if s < 0]

    together = kernels.linear_gated(
        x, operand, lora_of(kernels, seats, row_seats).operand("0.gate_up"), "silu"
    )

    for row in range(0, 96, 11):
        lora = lora_of(kernels, seats, [row_seats[row]])
        alone = kernels.linear_gated(x[row : row + 1], operand, lora.operand("0.gate_up"), "silu")
        assert torch.equal(alone[0], together[row]), row


@pytest.mark.parametrize("inner", [256, 9728])
def test_a_rank_does_not_change_a_neighbours_gated_sum(kernels: Any, inner: int) -> None:
    weights = [random_nf4(inner, 1536, nested=False) for _ in range(2)]
    operand = kernels.prepare_nf4(weights, None, gated=True)
    ranks = [(16, 16), (5, 16), (8, 8), (0, 12), (64, 16), (3, 1), (16, 0), (32, 64)]
    seats = Seats(len(ranks), num_groups=6)
    for seat, pair in enumerate(ranks):
        seats.put(seat, 2, 1536, [inner, inner], list(pair), bias=seat == 2)
    x = (torch.randn(40, 1536, device="cuda") / 16).bfloat16()
    for row_seats in ([0, 2, 4, 6] * 10, [*range(8), -1] * 2, [0] * 9, [4] * 7 + [1] * 7):
        rows = x[: len(row_seats)]
        lora = lora_of(kernels, seats, row_seats).operand("0.gate_up")
        together = kernels.linear_gated(rows, operand, lora, "silu")
        for row, seat in enumerate(row_seats[:18]):
            alone = lora_of(kernels, seats, [seat]).operand("0.gate_up")
            found = kernels.linear_gated(x[row : row + 1], operand, alone, "silu")
            assert torch.equal(found[0], together[row]), (row_seats, row)
