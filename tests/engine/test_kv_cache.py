"""Blocks: allocation, prefix reuse and its keys, eviction of old prefixes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loriner.core import Sequence
from loriner.engine.kv_cache import BlockManager
from tests.fakes import make_sequence

PROMPT = list(range(10))


def compute(blocks: BlockManager, sequence: Sequence) -> None:
    blocks.allocate(sequence, len(sequence.token_ids))
    sequence.num_computed = len(sequence.token_ids)
    blocks.commit(sequence, sequence.num_computed)


@pytest.mark.parametrize(("num_tokens", "found"), [(1, 0), (8, 4), (9, 4), (10, 8)])
def test_two_tokens_of_a_prompt_are_always_computed(num_tokens: int, found: int) -> None:
    blocks = BlockManager(8, 4, prefix_cache=True)
    compute(blocks, make_sequence(range(12)))
    assert blocks.match(make_sequence(range(num_tokens))) == found


def test_a_prefix_is_reused_but_the_last_token_is_always_computed() -> None:
    blocks = BlockManager(8, 4, prefix_cache=True)
    first, same = make_sequence(range(8)), make_sequence(range(8))
    compute(blocks, first)
    blocks.allocate(same, 8)
    assert same.num_computed == 4
    assert same.blocks[0] == first.blocks[0] and same.blocks[1] != first.blocks[1]
    blocks.check_integrity()


def test_a_prefix_outlives_its_sequence() -> None:
    blocks = BlockManager(8, 4, prefix_cache=True)
    first = make_sequence(PROMPT)
    compute(blocks, first)
    held = list(first.blocks)
    blocks.free(first)
    assert blocks.num_free == 8
    again = make_sequence(PROMPT)
    blocks.allocate(again, 10)
    assert again.blocks[:2] == held[:2] and again.num_cached == 8


@pytest.mark.parametrize(
    "other", [{"generation": "b"}, {"salt": "rival"}, {"generation": "a", "salt": "rival"}]
)
def test_no_adapter_or_tenant_reads_anothers_blocks(other: dict[str, str]) -> None:
    blocks = BlockManager(8, 4, prefix_cache=True)
    compute(blocks, make_sequence(PROMPT, generation="a"))
    assert blocks.match(make_sequence(PROMPT, generation="a")) == 8
    assert blocks.match(make_sequence(PROMPT, **other)) == 0


def test_a_block_is_found_only_after_it_was_computed() -> None:
    blocks = BlockManager(8, 4, prefix_cache=True)
    blocks.allocate(make_sequence(PROMPT), 10)
    assert blocks.match(make_sequence(PROMPT)) == 0


def test_free_blocks_without_a_prefix_are_used_first_then_the_oldest_prefix() -> None:
    blocks = BlockManager(4, 4, prefix_cache=True)
    old, new = make_sequence(range(6)), make_sequence(range(50, 56))
    compute(blocks, old)
    compute(blocks, new)
    blocks.free(old)
    blocks.free(new)
    blocks.allocate(make_sequence(range(90, 99)), 9)
    assert blocks.match(make_sequence(range(6))) == 0
    assert blocks.match(make_sequence(range(50, 56))) == 4


def test_without_the_prefix_cache_nothing_is_shared() -> None:
    blocks = BlockManager(8, 4, prefix_cache=False)
    compute(blocks, make_sequence(PROMPT))
    assert blocks.match(make_sequence(PROMPT)) == 0


def test_can_allocate_does_not_count_a_cached_free_block_twice() -> None:
    blocks = BlockManager(3, 4, prefix_cache=True)
    first = make_sequence(PROMPT)
    compute(blocks, first)
    blocks.free(first)
    assert blocks.can_allocate(make_sequence(range(12)), 12)
    assert not blocks.can_allocate(make_sequence(range(13)), 13)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 14), st.booleans()), max_size=40))
def test_blocks_are_never_lost_or_held_twice(actions: list[tuple[int, int, bool]]) -> None:
    blocks = BlockManager(6, 4, prefix_cache=True)
    live: dict[int, Sequence] = {}
    for who, length, drop in actions:
        if who in live and drop:
            blocks.free(live.pop(who))
        elif who not in live:
            sequence = make_sequence(range(length))
            if blocks.can_allocate(sequence, length):
                compute(blocks, sequence)
                live[who] = sequence
        blocks.check_integrity()
    for sequence in live.values():
        blocks.free(sequence)
    assert blocks.num_free == 6
