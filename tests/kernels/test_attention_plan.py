"""The work lists of paged attention: what each thread block of a step does. Runs without a GPU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cuda.bindings")

from loriner.kernels.cuda import attention, nvrtc
from loriner.kernels.cuda.attention import (
    COST_KEYS,
    MAX_CHUNKS,
    Ints,
    chunk_length,
    count_chunks,
    decode_items,
    max_chunks,
    max_decode_items,
    max_prefill_items,
    prefill_items,
    tile_tokens,
)

MOST_CONTEXT = 1 << 20
EDGES = (
    *(1, 16, 17, 63, 64, 65, 80, 81, 127, 128, 129, 144, 145, 272, 273),
    *(512, 2047, 2048, 2049, 2064, 2065, 8192, 8193, 8209, 32768, 32769, MOST_CONTEXT),
)
contexts = st.one_of(st.sampled_from(EDGES), st.integers(1, 4096), st.integers(1, MOST_CONTEXT))
Sequence = tuple[int, int]  # rows of this step, keys that the last one sees


@st.composite
def sequences(draw: st.DrawFn) -> list[Sequence]:
    """A step: padded sequences (no rows), decodes (one) and chunks of prompts (several)."""
    made = []
    for _ in range(draw(st.integers(0, 12))):
        rows = draw(st.one_of(st.sampled_from((0, 1, 1, 1, 2, 16, 17)), st.integers(0, 600)))
        made.append((rows, max(rows, draw(contexts)) if rows else 0))
    return made


def arrays(step: list[Sequence]) -> tuple[Ints, Ints]:
    """q_start [S+1] and context [S]."""
    q_start = np.cumsum([0, *(rows for rows, _ in step)]).astype(np.int32)
    return q_start, np.array([context for _, context in step], dtype=np.int32)


class Item(NamedTuple):
    """As csrc/feed.cuh has it."""

    sequence: int
    row: int
    context: int
    length: int
    start: int
    cost: int
    first_chunk: int
    num_chunks: int


def listed(step: list[Sequence]) -> list[Item]:
    return [Item(*item) for item in decode_items(*arrays(step))[1:].tolist()]


def pieces(item: Item, warps: int = 4) -> list[list[range]]:
    """The keys of each warp in each chunk, as `Feed::open_chunk` has them."""
    found = []
    for chunk in range(item.num_chunks):
        first, keys = chunk * item.length, item.length // warps
        last = item.context if chunk + 1 == item.num_chunks else first + item.length
        ends = [min(first + (i + 1) * keys, last) for i in range(warps - 1)] + [last]
        found.append([range(first + i * keys, end) for i, end in enumerate(ends)])
    return found


@given(sequences())
def test_every_decoding_sequence_is_listed_once_in_order_behind_what_all_have(
    step: list[Sequence],
) -> None:
    made, items = decode_items(*arrays(step)), listed(step)
    q_start, _ = arrays(step)
    assert made.dtype == np.int32 and made.shape[1] == attention.ITEM_INTS
    assert [item.sequence for item in items] == [s for s, (rows, _) in enumerate(step) if rows == 1]
    assert [item.row for item in items] == [q_start[item.sequence] for item in items]
    assert [item.context for item in items] == [step[item.sequence][1] for item in items]
    if items:
        totals = [len(items), sum(i.cost for i in items), sum(i.num_chunks for i in items)]
        assert made[0].tolist() == [*totals, *[0] * 5]


@given(sequences())
def test_what_comes_before_an_item_is_the_sum_of_those_before(step: list[Sequence]) -> None:
    start = first_chunk = 0
    for item in listed(step):
        assert (item.start, item.first_chunk) == (start, first_chunk)
        start, first_chunk = start + item.cost, first_chunk + item.num_chunks


@given(st.integers(1, 40000) | st.sampled_from(EDGES), st.sampled_from((2, 4)))
def test_pieces_of_chunks_cover_every_key_once_and_in_order(context: int, warps: int) -> None:
    (item,) = listed([(1, context)])
    chunks = pieces(item, warps)
    assert 1 <= len(chunks) <= MAX_CHUNKS
    read = [piece for chunk in chunks for piece in chunk if piece]
    assert [piece.start for piece in read] == [0, *(piece.stop for piece in read[:-1])]
    assert read[-1].stop == context
    assert all(len(chunk[0]) > 0 for chunk in chunks), "a chunk's first piece is never empty"
    assert 0 <= (item.cost - len(chunks)) * COST_KEYS - context < 64


@given(sequences(), st.data())
def test_how_a_sequence_is_cut_depends_on_its_own_context_alone(
    step: list[Sequence], data: st.DataObject
) -> None:
    cuts = {i.sequence: (i.context, i.length, i.cost, i.num_chunks) for i in listed(step)}
    for sequence, cut in cuts.items():
        (alone,) = listed([step[sequence]])
        assert (alone.context, alone.length, alone.cost, alone.num_chunks) == cut
    order = data.draw(st.permutations(range(len(step))))
    shuffled = listed([step[i] for i in order])
    assert {
        order[i.sequence]: (i.context, i.length, i.cost, i.num_chunks) for i in shuffled
    } == cuts


@given(st.lists(contexts, min_size=1))
def test_chunks_begin_on_whole_tiles_and_grow_with_the_context(keys: list[int]) -> None:
    context = np.array(sorted(keys), dtype=np.int32)
    length = chunk_length(context)
    assert length.dtype == np.int32
    assert (length % 64 == 0).all() and (length >= 64).all()
    for alike in (context <= 272, context > 272):  # not cut, and cut
        assert (np.diff(length[alike]) >= 0).all()
    assert (count_chunks(context) <= MAX_CHUNKS).all()


def test_short_contexts_are_not_split_and_middling_ones_spread_over_the_card() -> None:
    context = np.array([1, 128, 272, 273, 512, 2048, 8192, 32768], dtype=np.int32)
    assert count_chunks(context).tolist() == [1, 1, 1, 3, 4, 16, 32, 64]


def test_what_is_not_split_is_shared_evenly_by_the_warps() -> None:
    for context in (64, 80, 100, 193, 272):
        (keys,) = pieces(listed([(1, context)])[0])
        tiles = [-(-len(part) // 16) for part in keys]
        assert sum(map(len, keys)) == context
        assert max(tiles) <= -(-context // 64) + 1


@given(sequences(), st.sampled_from((16, 32, 64, 128)))
def test_tiles_cover_every_row_of_a_prompt_once(step: list[Sequence], tokens: int) -> None:
    q_start, context = arrays(step)
    items = prefill_items(q_start, context, tokens)
    assert items.dtype == np.int32 and items.shape[1] == attention.TILE_INTS
    tiles: dict[int, list[int]] = {}
    for sequence, first in items.tolist():
        tiles.setdefault(sequence, []).append(first)
    assert set(tiles) == {s for s, (rows, _) in enumerate(step) if rows > 1}
    for sequence, own in tiles.items():
        firsts = sorted(own)
        assert firsts == list(range(q_start[sequence], q_start[sequence + 1], tokens))


@given(sequences(), st.sampled_from((16, 32, 64, 128)))
def test_tiles_with_most_keys_come_first(step: list[Sequence], tokens: int) -> None:
    q_start, context = arrays(step)
    keys = []
    for sequence, first in prefill_items(q_start, context, tokens).tolist():
        last = min(first + tokens, int(q_start[sequence + 1]))
        keys.append(context[sequence] - (q_start[sequence + 1] - last))
    assert keys == sorted(keys, reverse=True)


@given(sequences(), st.sampled_from((16, 32, 64, 128)), st.integers(0, 64))
def test_no_step_needs_more_items_than_were_allowed_for(
    step: list[Sequence], tokens: int, more: int
) -> None:
    q_start, context = arrays(step)
    most = max([1, *context.tolist()]) + more
    live = [sequence for sequence in step if sequence[0]]
    rows = int(q_start[-1])
    assert sum(item.num_chunks for item in listed(step)) <= max_chunks(len(live), most)
    assert len(decode_items(q_start, context)) <= max_decode_items(len(live))
    tiles = prefill_items(q_start, context, tokens)
    assert len(tiles) <= max_prefill_items(rows, len(live), tokens)


@pytest.mark.parametrize("context", EDGES)
def test_the_bound_on_chunks_is_reached(context: int) -> None:
    most = max_chunks(1, context)
    tried = [n for n in EDGES if n <= context]
    assert max(listed([(1, n)])[0].num_chunks for n in tried) == most <= MAX_CHUNKS
    assert max_chunks(7, context) == 7 * most


def test_a_step_without_work_has_empty_lists() -> None:
    for step in ([], [(0, 0)], [(0, 0), (0, 0)]):
        q_start, context = arrays(step)
        assert decode_items(q_start, context).shape == (0, attention.ITEM_INTS)
        assert prefill_items(q_start, context, 16).shape == (0, attention.TILE_INTS)


@pytest.mark.parametrize("head_dim", [16, 64, 128, 192, 256])
@pytest.mark.parametrize("group", range(1, 17))
def test_a_prefill_tile_is_whole_spans_and_blocks_fit_a_multiprocessor(
    group: int, head_dim: int
) -> None:
    assert tile_tokens(group, head_dim) in (16, 32, 48, 64, 128)
    assert attention.decode_smem(group, head_dim) <= 99 << 10, "of the smallest card"
    assert attention.prefill_smem(group, head_dim) <= 99 << 10


def test_the_source_has_the_same_constants() -> None:
    feed = (nvrtc.SOURCES / "feed.cuh").read_text()
    assert f"#define D_COST_KEYS {COST_KEYS} " in feed
    assert f"#define D_STAGES {attention.DECODE_STAGES}\n" in feed
    assert f"#define D_KEYS {attention.TILE_KEYS} " in feed
    rope = (nvrtc.SOURCES / attention.ROPE).read_text()
    assert f"#define THREADS {attention.ROPE_THREADS}\n" in rope
