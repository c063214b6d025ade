"""The normalised adapter and the digest that is its identity."""

from __future__ import annotations

import math

import pytest
import torch

from loriner.adapters.adapter import Adapter, LoraWeight, digest_of


def weight(rank: int = 2, scaling: float = 2.0, bias: bool = False) -> LoraWeight:
    a = torch.arange(rank * 4, dtype=torch.float32).reshape(rank, 4)
    b = torch.arange(3 * rank, dtype=torch.float32).reshape(3, rank)
    return LoraWeight(a, b, torch.ones(3) if bias else None, scaling)


def test_an_adapter_says_what_it_holds() -> None:
    adapter = Adapter.of(
        {
            "model.layers.0.mlp.up_proj": weight(2),
            "model.layers.1.mlp.up_proj": weight(5, bias=True),
        }
    )
    assert adapter.ranks == (2, 5) and adapter.max_rank == 5
    assert adapter.targets == ("up_proj",)
    assert adapter.num_bytes == 4 * (2 * 4 + 3 * 2 + 5 * 4 + 3 * 5 + 3)
    assert len(adapter.generation) == 64


def test_the_digest_ignores_order_and_memory_layout() -> None:
    first, second = weight(2), weight(3)
    strided = LoraWeight(first.a.t().contiguous().t(), first.b, None, first.scaling)
    assert not strided.a.is_contiguous()
    assert digest_of({"x": first, "y": second}) == digest_of({"y": second, "x": strided})


@pytest.mark.parametrize(
    "other",
    [
        weight(scaling=math.nextafter(2.0, 3.0)),
        weight(bias=True),
        weight(rank=3),
        LoraWeight(weight().a.bfloat16(), weight().b, None, 2.0),
        LoraWeight(weight().a.reshape(4, 2), weight().b, None, 2.0),
        LoraWeight(weight().a + 1e-6, weight().b, None, 2.0),
    ],
)
def test_the_digest_changes_with_anything_that_changes_the_answer(other: LoraWeight) -> None:
    assert digest_of({"x": weight()}) != digest_of({"x": other})
    assert digest_of({"x": weight()}) != digest_of({"y": weight()})


def test_the_digest_is_the_same_for_ever() -> None:
    """Stores on disk are named by it: a change here needs a new digest domain and a migration."""
    assert digest_of({"x": weight(bias=True)}) == (
        "32301a558545bcd139089e25f71bfe9c4a47bbe060268874c450ff3c11198489"
    )
