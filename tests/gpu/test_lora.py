"""Adapters on the GPU against float64: ranks, mixtures, slices, biases, rows, graphs."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch

from loriner.adapters.adapter import Adapter, LoraWeight
from loriner.adapters.image import ImageLayout, pack_image
from tests.adapters.fake_device import FUSED, layout_of
from tests.gpu.conftest import RANKS, ROWS
from tests.gpu.operands import (
    POISON,
    Seats,
    alone_and_replayed,
    dense,
    error,
    items_of,
    lora_of,
    random_nf4,
)

pytestmark = pytest.mark.gpu


def popularity(kind: str, rows: int, num_seats: int) -> list[int]:
    """A seat for each row, base-only rows last."""
    base = rows // 5
    if kind == "identical":
        return [0] * rows
    if kind == "distinct":
        return [i % num_seats for i in range(rows)]
    if kind == "skewed":
        used = sorted(min(int(random.expovariate(0.7)), num_seats - 1) for _ in range(rows - base))
    else:
        used = sorted(random.randrange(num_seats) for _ in range(rows - base))
    return [*used, *[-1] * base]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("kind", ["identical", "distinct", "uniform", "skewed"])
def test_adapters_equal_float64(kernels: Any, kind: str, rank: int) -> None:
    sizes, inputs, num_seats = [512, 128, 128], 576, 9
    weights = [random_nf4(size, inputs, nested=False) for size in sizes]
    operand = kernels.prepare_nf4(weights, None)
    exact = torch.cat([dense(weight) for weight in weights])
    seats = Seats(num_seats, num_groups=6)
    for seat in range(num_seats):
        ranks = [rank, rank if seat % 2 else 0, max(1, rank // 2)]
        seats.put(seat, 0, inputs, sizes, ranks, bias=seat % 3 == 0)

    for rows in ROWS:
        row_seats = popularity(kind, rows, num_seats)
        lora = lora_of(kernels, seats, row_seats).operand("0.qkv")
        x = torch.randn(rows, inputs, device="cuda").bfloat16()
        for multiply, most in ((kernels.logits, 2e-3), (kernels.linear, 4e-3)):
            for found in alone_and_replayed(partial(multiply, x, operand, lora), x):
                added = seats.expected(x.double(), row_seats, 0, sum(sizes))
                assert error(found, x.double() @ exact.t() + added) < most, rows


@pytest.mark.parametrize("inputs", [64, 128, 448, 2624])
def test_adapters_of_any_width_equal_float64(kernels: Any, inputs: int) -> None:
    """Of few inputs some warps have none of A x; of many there are parts."""
    weight = random_nf4(320, inputs, nested=False)
    operand, seats, exact = kernels.prepare_nf4([weight], None), Seats(5, 6), dense(weight)
    for seat in range(5):
        seats.put(seat, 0, inputs, [320], [8 * seat + 8], bias=False)
    for rows in (1, 8, 16, 24, 64, 128):
        row_seats = sorted(i % 5 for i in range(rows))
        x = torch.randn(rows, inputs, device="cuda").bfloat16()
        lora = lora_of(kernels, seats, row_seats).operand("0.qkv")
        for found in alone_and_replayed(partial(kernels.logits, x, operand, lora), x):
            added = seats.expected(x.double(), row_seats, 0, 320)
            assert error(found, x.double() @ exact.t() + added) < 2e-3, rows


@pytest.mark.parametrize("sizes", [[72, 40, 24], [100, 60], [1000]])
def test_slices_may_end_within_a_block_or_a_tile(kernels: Any, sizes: list[int]) -> None:
    """So that some blocks, and some tiles of 16 outputs, have outputs of two, or none at all."""
    inputs = 2048
    weights = [random_nf4(size, inputs, nested=False) for size in sizes]
    operand, seats = kernels.prepare_nf4(weights, None), Seats(4, num_groups=6)
    exact = torch.cat([dense(weight) for weight in weights])
    for seat, rank in enumerate((16, 8, 5, 32)):
        seats.put(seat, 0, inputs, sizes, [rank] * len(sizes), bias=seat == 2)
    for rows in (1, 8, 16, 40, 128, 300):
        row_seats = popularity("uniform", rows, 4)
        x = torch.randn(rows, inputs, device="cuda").bfloat16()
        lora = lora_of(kernels, seats, row_seats).operand("0.qkv")
        for multiply, most in ((kernels.logits, 2e-3), (kernels.linear, 4e-3)):
            for found in alone_and_replayed(partial(multiply, x, operand, lora), x):
                added = seats.expected(x.double(), row_seats, 0, sum(sizes))
                assert error(found, x.double() @ exact.t() + added) < most, rows


@pytest.mark.parametrize("inputs", [5120, 11008, 14336])
def test_units_of_a_product_may_be_many(kernels: Any, inputs: int) -> None:
    """Some for each thread block, one after another, also where parts are not cut evenly."""
    outputs, num_seats = 576, 64
    weight = random_nf4(outputs, inputs, nested=False)
    operand, seats, exact = kernels.prepare_nf4([weight], None), Seats(num_seats, 6), dense(weight)
    for seat in range(num_seats):
        seats.put(seat, 3, inputs, [outputs], [64], bias=False)
    for rows in (8, 16, 24, 64):
        row_seats = list(range(rows))
        x = torch.randn(rows, inputs, device="cuda").bfloat16()
        lora = lora_of(kernels, seats, row_seats).operand("0.down")
        for found in alone_and_replayed(partial(kernels.logits, x, operand, lora), x):
            added = seats.expected(x.double(), row_seats, 3, outputs)
            assert error(found, x.double() @ exact.t() + added) < 2e-3, rows


@pytest.mark.timeout(60)
def test_nobody_waits_for_a_block_that_finds_no_room(kernels: Any) -> None:
    """Clusters of four leave some multiprocessors over: not all blocks run at once, and there are
    more units of A x than blocks."""
    sizes, inputs, rows = [2560], 9728, 16
    weight = random_nf4(sizes[0], inputs, nested=False)
    operand, seats = kernels.prepare_nf4([weight], None), Seats(rows, num_groups=6)
    for seat in range(rows):
        seats.put(seat, 0, inputs, sizes, [32], bias=False)
    x = torch.randn(rows, inputs, device="cuda").bfloat16()
    expected = x.double() @ dense(weight).t()
    expected += seats.expected(x.double(), list(range(rows)), 0, sizes[0])
    lora = lora_of(kernels, seats, list(range(rows)))
    assert error(kernels.logits(x, operand, lora.operand("0.qkv")), expected) < 2e-3


def test_mixed_ranks_share_a_step(kernels: Any) -> None:
    inputs, inner = 1536, 576
    operand_weight = random_nf4(inner, inputs, nested=False)
    operand = kernels.prepare_nf4([operand_weight], None)
    seats = Seats(len(RANKS), num_groups=6)
    for seat, rank in enumerate(RANKS):
        seats.put(seat, 3, inputs, [inner], [rank], bias=False)
    row_seats = [i for i in range(len(RANKS)) for _ in range(5)] + [-1] * 7
    x = torch.randn(len(row_seats), inputs, device="cuda").bfloat16()
    h = torch.zeros(len(row_seats), inner, device="cuda")

    kernels.linear_add(h, x, operand, lora_of(kernels, seats, row_seats).operand("0.down"))

    added = seats.expected(x.double(), row_seats, 3, inner)
    assert error(h, x.double() @ dense(operand_weight).t() + added) < 2e-3


@pytest.mark.parametrize("rows", [40, 300])
def test_rows_without_an_adapter_are_as_if_there_were_none(kernels: Any, rows: int) -> None:
    """Also where cuBLAS multiplies and other kernels finish rows with adapters."""
    weight, half = random_nf4(4096, 4096, nested=True), rows // 2
    operand, seats = kernels.prepare_nf4([weight], None), Seats(2, num_groups=6)
    seats.put(0, 1, 4096, [4096], [16], bias=False)
    x = torch.randn(rows, 4096, device="cuda").bfloat16()
    lora = lora_of(kernels, seats, [0] * half + [-1] * half).operand("0.o")
    mixed, alone = torch.zeros(2, rows, 4096, device="cuda")

    kernels.linear_add(mixed, x, operand, lora)
    kernels.linear_add(alone, x, operand)

    assert torch.equal(mixed[half:], alone[half:])
    assert torch.equal(kernels.linear(x, operand, lora)[half:], kernels.linear(x, operand)[half:])


def test_a_rank_does_not_change_a_neighbours_sum(kernels: Any) -> None:
    """Ranks that are read eight at a time, beside others that cannot be."""
    weight = random_nf4(576, 1536, nested=False)
    operand, ranks = kernels.prepare_nf4([weight], None), [16, 5, 8, 1, 24, 3, 64, 16]
    seats = Seats(len(ranks), num_groups=6)
    for seat, rank in enumerate(ranks):
        seats.put(seat, 1, 1536, [576], [rank], bias=seat % 2 == 0)
    row_seats = [*range(len(ranks)), -1]
    x = torch.randn(len(row_seats), 1536, device="cuda").bfloat16()

    together = kernels.logits(x, operand, lora_of(kernels, seats, row_seats).operand("0.o"))

    for row, seat in enumerate(row_seats):
        lora = lora_of(kernels, seats, [seat])
        alone = kernels.logits(x[row : row + 1], operand, lora.operand("0.o"))
        assert torch.equal(alone[0], together[row]), row


def test_a_launch_may_have_more_blocks_than_the_card_holds(kernels: Any) -> None:
    weight = random_nf4(40_000, 576, nested=False)
    operand, seats = kernels.prepare_nf4([weight], None), Seats(3, num_groups=6)
    for seat in range(3):
        seats.put(seat, 4, 576, [40_000], [16], bias=False)
    row_seats = [0] * 200 + [1] * 100 + [2] * 50
    x = torch.randn(len(row_seats), 576, device="cuda").bfloat16()
    expected = x.double() @ dense(weight).t()
    expected += seats.expected(x.double(), row_seats, 4, 40_000)

    for _ in range(3):
        found = kernels.logits(x, operand, lora_of(kernels, seats, row_seats).operand("lm_head"))
        assert error(found, expected) < 2e-3


def test_the_count_of_launches_may_wrap(kernels: Any) -> None:
    weight = random_nf4(576, 576, nested=False)
    operand, seats = kernels.prepare_nf4([weight], None), Seats(2, num_groups=6)
    for seat in range(2):
        seats.put(seat, 1, 576, [576], [16], bias=False)
    row_seats, exact = [0, 0, 1, -1], dense(weight)
    kernels.linears._gate.copy_(torch.tensor([-2, 0], dtype=torch.int32))  # the last but one

    for launch in range(4):
        x = torch.randn(4, 576, device="cuda").bfloat16()
        found = kernels.logits(x, operand, lora_of(kernels, seats, row_seats).operand("0.o"))
        added = seats.expected(x.double(), row_seats, 1, 576)
        assert error(found, x.double() @ exact.t() + added) < 2e-3, launch
    assert kernels.linears._gate.tolist() == [3, 0]


def test_one_graph_serves_any_mixture(kernels: Any) -> None:
    weight = random_nf4(4096, 4096, nested=True)
    operand, seats, rows = kernels.prepare_nf4([weight], None), Seats(8, num_groups=6), 24
    for seat in range(8):
        seats.put(seat, 1, 4096, [4096], [RANKS[seat]], bias=False)
    exact = dense(weight)
    lora = lora_of(kernels, seats, [-1] * rows)
    x = torch.zeros(rows, 4096, device="cuda").bfloat16()
    kernels.logits(x, operand, lora.operand("0.o"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        planned = kernels.seat_lora(*lora[:4])
        y = kernels.logits(x, operand, planned.operand("0.o"))
    for kind in ("identical", "distinct", "uniform", "skewed"):
        row_seats = popularity(kind, rows, 8)
        for static, new in zip(lora[1:4], items_of(row_seats), strict=True):
            static.copy_(new)
        x.copy_(torch.randn(rows, 4096))
        y.fill_(POISON)
        graph.replay()
        added = seats.expected(x.double(), row_seats, 1, 4096)
        assert error(y, x.double() @ exact.t() + added) < 2e-3, kind


def test_the_embedding_is_adapted(kernels: Any) -> None:
    seats = Seats(2, num_groups=6)
    table = torch.randn(100, 64, device="cuda").bfloat16()
    a, b = (
        torch.randn(100, 8, device="cuda").bfloat16(),
        torch.randn(64, 8, device="cuda").bfloat16(),
    )
    entry = seats.table[1, 5]
    entry[0:8].view(torch.int64)[0] = a.data_ptr()
    entry[8:16].view(torch.int64)[0] = b.data_ptr()
    entry[56:60].view(torch.float32)[0] = 0.5
    entry[68:72].view(torch.int32)[0] = 8
    row_seats = [0, 0, 1, 1, -1]
    tokens = torch.randint(0, 100, (5,), device="cuda", dtype=torch.int32)

    h = kernels.embed(tokens, table)
    kernels.lora_embed_add(h, tokens, lora_of(kernels, seats, row_seats).embeddings)

    expected = table[tokens.long()].double()
    expected[2:4] += 0.5 * a[tokens[2:4].long()].double() @ b.double().t()
    assert error(h, expected) < 1e-6


def test_images_are_read_as_they_are_written(kernels: Any) -> None:
    """Of ranks and outputs that go into tiles, and of others, with biases and an embedding."""
    hidden, sizes, vocab = 576, [576, 192, 200], 96
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    widths = dict.fromkeys((name for part in FUSED.values() for name in part), (hidden, hidden))
    shapes = {f"model.layers.0.{name}": shape for name, shape in widths.items()}
    shapes |= {name: (size, hidden) for name, size in zip(names, sizes, strict=True)}
    layout = ImageLayout(layout_of(shapes))
    weights = [random_nf4(size, hidden, nested=False) for size in sizes]
    operand = kernels.prepare_nf4(weights, None)
    base = torch.cat([dense(weight) for weight in weights])
    for ranks in ((16, 16, 16), (4, 64, 8), (6, 12, 1), (32, 5, 256)):
        made = {
            name: LoraWeight(
                torch.randn(rank, hidden), torch.randn(size, rank) / 8, bias, 0.5 + rank / 16
            )
            for name, rank, size in zip(names, ranks, sizes, strict=True)
            for bias in [torch.randn(size) if rank == 12 else None]
        }
        embedding = LoraWeight(
            torch.randn(ranks[0], vocab), torch.randn(hidden, ranks[0]), None, 2.0
        )
        image = pack_image(Adapter.of(made | {"model.embed_tokens": embedding}), layout)
        memory = image.bytes.cuda()
        addresses = [memory.data_ptr() + start for start, _ in image.plan.chunks]
        table = torch.from_numpy(image.plan.entries(addresses))[None].cuda()
        kernels.tile_seat(table[0])
        for rows in (3, 16, 64, 300):
            row_seats = [0] * (rows - 1) + [-1]
            lora = kernels.seat_lora(table, *items_of(row_seats))
            x = torch.randn(rows, hidden, device="cuda").bfloat16()
            expected = x.double() @ base.t()
            expected[:-1] += torch.cat([_delta(w, x[:-1].double()) for w in made.values()], dim=1)
            assert error(kernels.logits(x, operand, lora.operand("0.qkv")), expected) < 2e-3, rows

        tokens = torch.tensor([0, 5, vocab - 1, 7], device="cuda", dtype=torch.int32)
        h = torch.zeros(4, hidden, device="cuda")
        lora = kernels.seat_lora(table, *items_of([0, 0, 0, -1]))
        kernels.lora_embed_add(h, tokens, lora.embeddings)
        one_hot = torch.nn.functional.one_hot(tokens[:3].long(), vocab).double()
        assert error(h[:3], _delta(embedding, one_hot)) < 1e-3
        assert not h[3].any()


def _delta(weight: LoraWeight, x: torch.Tensor) -> torch.Tensor:
    """What an adapter of bf16 weights adds to rows x [M, K] f64 of one linear."""
    a, b = (t.bfloat16().double().cuda() for t in (weight.a, weight.b))
    y = x @ a.t() @ b.t()
    return weight.scaling * (y if weight.bias is None else y + weight.bias.double().cuda())
