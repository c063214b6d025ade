"""Pages: nothing overlaps, nothing is lost, whatever comes and goes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loriner.adapters.arena import Allocation, Arena


def pages(allocation: Allocation) -> list[int]:
    return [p for start, n in allocation.runs for p in range(start, start + n)]


def test_chunks_stand_side_by_side_where_there_is_room() -> None:
    arena = Arena(10)
    allocation = arena.allocate([3, 2, 1])
    assert allocation.starts == (0, 3, 5) and allocation.runs == ((0, 6),)


def test_the_smallest_run_that_holds_all_is_taken() -> None:
    arena = Arena(20)
    a, _, c, _ = (arena.allocate([n]) for n in (8, 1, 3, 1))
    arena.free(a)
    arena.free(c)
    assert arena.allocate([3]).starts == (9,)


def test_chunks_are_spread_when_no_run_holds_all() -> None:
    arena = Arena(9)
    first, _, third = (arena.allocate([3]) for _ in range(3))
    arena.free(first)
    arena.free(third)
    assert not arena.can_allocate([4, 2])
    spread = arena.allocate([3, 3])
    assert sorted(spread.starts) == [0, 6]
    arena.check_integrity()


def test_a_large_chunk_at_the_end_finds_its_run() -> None:
    arena = Arena(8)
    first, _ = arena.allocate([5]), arena.allocate([1])
    arena.free(first)
    arena.allocate([2, 5])
    assert arena.num_free == 0
    arena.check_integrity()


def test_freed_neighbours_become_one_run() -> None:
    arena = Arena(9)
    parts = [arena.allocate([3]) for _ in range(3)]
    for i in (0, 2, 1):
        arena.free(parts[i])
        arena.check_integrity()
    assert arena.allocate([9]).starts == (0,)


def test_allocating_without_room_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        Arena(1).allocate([2])


def test_a_trial_changes_nothing() -> None:
    arena = Arena(4)
    held = arena.allocate([4])
    trial = arena.trial()
    assert not trial.can_allocate([1])
    trial.give_back(held)
    assert trial.can_allocate([2, 2]) and not arena.can_allocate([1])
    arena.check_integrity()


CHUNKS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(st.lists(st.tuples(st.booleans(), CHUNKS, st.integers(0, 1000)), max_size=80))
def test_nothing_overlaps_and_nothing_is_lost(steps: list[tuple[bool, list[int], int]]) -> None:
    arena = Arena(64)
    held: list[Allocation] = []
    for takes, chunks, which in steps:
        if takes and arena.can_allocate(chunks):
            allocation = arena.allocate(chunks)
            for start, n in zip(allocation.starts, chunks, strict=True):
                assert set(range(start, start + n)) <= set(pages(allocation))
            assert len(pages(allocation)) == sum(chunks)
            held.append(allocation)
        elif held:
            arena.free(held.pop(which % len(held)))
        arena.check_integrity()
        used = [page for allocation in held for page in pages(allocation)]
        assert len(set(used)) == len(used) == 64 - arena.num_free
    for allocation in held:
        arena.free(allocation)
    assert arena.num_free == 64 and arena.can_allocate([64])


@given(st.lists(CHUNKS, min_size=1, max_size=20), CHUNKS, st.data())
def test_a_trial_tells_what_freeing_would_do(
    sizes: list[list[int]], wanted: list[int], data: st.DataObject
) -> None:
    arena = Arena(64)
    held = [arena.allocate(chunks) for chunks in sizes if arena.can_allocate(chunks)]
    given_up = data.draw(st.lists(st.sampled_from(held), unique=True)) if held else []
    trial = arena.trial()
    for allocation in given_up:
        trial.give_back(allocation)
    promised = trial.can_allocate(wanted)
    for allocation in given_up:
        arena.free(allocation)
    assert arena.can_allocate(wanted) == promised
    assert promised or sum(wanted) > arena.num_free or len(wanted) > 1 or len(held) > 0
