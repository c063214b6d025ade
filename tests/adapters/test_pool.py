"""Seats: pins, eviction order, bytes, and how an adapter is laid out for the kernels."""

from __future__ import annotations

import pytest
import torch

from loriner.adapters.adapter import Adapter, LoraWeight
from loriner.adapters.pool import Placement, Pool, SeatWeights, pack
from loriner.errors import InvalidAdapterError
from loriner.kernels.operands import EMBEDDING


def weights(num_bytes: int = 10) -> SeatWeights:
    return SeatWeights({}, None, num_bytes)


def test_evicts_the_least_recently_used_idle_seat() -> None:
    pool = Pool(30, max_seats=8)
    for name in "abc":
        pool.seat(name, weights())
    pool.acquire("a")
    pool.release("a")
    assert pool.seat("d", weights()) == ["b"]
    assert [name in pool for name in "abcd"] == [True, False, True, True]
    pool.check_integrity()


def test_a_pinned_seat_is_never_evicted() -> None:
    pool = Pool(20, max_seats=8)
    pool.seat("a", weights())
    pool.acquire("a")
    pool.seat("b", weights())
    pool.seat("c", weights())
    assert "a" in pool and "b" not in pool
    assert not pool.can_evict("a")
    pool.acquire("c")
    assert not pool.can_seat(weights(1))
    pool.release("c")
    assert pool.can_seat(weights(10)) and not pool.can_seat(weights(11))


def test_a_kept_seat_makes_room_last() -> None:
    pool = Pool(20, max_seats=2)
    pool.kept = frozenset("a")
    pool.seat("a", weights())
    pool.seat("b", weights())
    assert pool.seat("c", weights()) == ["b"]
    pool.acquire("c")
    assert pool.seat("d", weights()) == ["a"], "nobody waits for ever because of a pin"


def test_the_number_of_seats_is_kept() -> None:
    pool = Pool(1000, max_seats=2)
    for name in "abc":
        pool.seat(name, weights())
    assert len(pool) == 2 and pool.used_bytes == 20


def test_every_pin_is_counted() -> None:
    pool = Pool(20, max_seats=2)
    pool.seat("a", weights())
    pool.acquire("a")
    pool.acquire("a")
    pool.release("a")
    assert pool.num_pins("a") == 1 and not pool.can_evict("a")


LAYOUT = {
    "q": Placement("0.qkv", 0),
    "v": Placement("0.qkv", 6),
    "head": Placement("lm_head", 0),
    "emb": Placement(EMBEDDING, 0),
}


def lora(rank: int, inputs: int, outputs: int, scaling: float = 1.0) -> LoraWeight:
    return LoraWeight(torch.randn(rank, inputs), torch.randn(outputs, rank), None, scaling)


def test_slices_of_a_fused_linear_share_one_a_at_their_exact_ranks() -> None:
    adapter = Adapter.of({"v": lora(3, 4, 2, 0.5), "q": lora(2, 4, 6, 2.0)})
    packed = pack(adapter, LAYOUT, torch.float32)
    group = packed.groups["0.qkv"]
    assert group.a.shape == (5, 4)
    assert [(p.offset, p.rank_start, p.rank_end) for p in group.parts] == [(0, 0, 2), (6, 2, 5)]
    assert torch.equal(group.parts[1].b, adapter.modules["v"].b.t())
    assert [part.scale for part in group.parts] == [2.0, 0.5]
    assert packed.num_bytes == 4 * (5 * 4 + 2 * 6 + 3 * 2)


def test_an_embedding_is_laid_out_for_look_up() -> None:
    adapter = Adapter.of({"emb": LoraWeight(torch.randn(2, 9), torch.randn(4, 2), None, 3.0)})
    packed = pack(adapter, LAYOUT, torch.float32)
    assert packed.embedding is not None
    assert packed.embedding.a.shape == (9, 2) and packed.embedding.b.shape == (2, 4)


def test_bf16_weights_stay_bf16() -> None:
    half = LoraWeight(torch.randn(2, 4).bfloat16(), torch.randn(6, 2).bfloat16(), None, 1.0)
    packed = pack(Adapter.of({"q": half}), LAYOUT, torch.float32)
    assert packed.groups["0.qkv"].a.dtype is torch.bfloat16
    assert packed.num_bytes == 2 * (2 * 4 + 2 * 6)
    mixed = pack(Adapter.of({"q": half, "v": lora(1, 4, 2)}), LAYOUT, torch.float32)
    assert mixed.groups["0.qkv"].a.dtype is torch.float32


def test_weights_that_overflow_with_their_scaling_are_refused() -> None:
    bias = LoraWeight(torch.ones(1, 4), torch.ones(6, 1), torch.full((6,), 3e38), 64.0)
    with pytest.raises(InvalidAdapterError, match="finite"):
        pack(Adapter.of({"q": bias}), LAYOUT, torch.float32)


def test_a_seat_has_a_number_of_its_own_while_it_lasts() -> None:
    pool = Pool(1000, max_seats=3)
    for name in "abc":
        pool.seat(name, weights())
    assert {pool.seat_id(name) for name in "abc"} == {0, 1, 2}
    freed = pool.seat_id("b")
    pool.evict("b")
    pool.seat("d", weights())
    assert pool.seat_id("d") == freed and pool.is_ready("d")
    pool.check_integrity()


def test_a_refusal_is_not_remembered_once_something_changed() -> None:
    pool = Pool(20, max_seats=4)
    pool.seat("a", weights())
    pool.seat("b", weights())
    pool.acquire("a")
    assert not pool.can_seat(weights(11))
    pool.release("a")
    assert pool.can_seat(weights(11)) and pool.can_seat(weights(20))


def test_without_idle_bytes_seats_are_enough() -> None:
    pool = Pool(20, max_seats=1)
    pool.seat("a", weights(0))
    assert pool.seat("b", weights(20)) == ["a"]
    pool.acquire("b")
    assert not pool.can_seat(weights(0))
