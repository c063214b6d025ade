"""The work lists of paged attention: what each thread block of a step does. Runs without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cuda.bindings")

from loriner.kernels.cuda import attention, nvrtc
from loriner.kernels.cuda.attention import (
    MAX_CHUNKS,
    Ints,
    chunk_length,
    decode_items,
    max_decode_items,
    max_prefill_items,
    prefill_items,
    tile_tokens,
)

MOST_CONTEXT = 1 << 20
EDGES = (1, 63, 64, 65, 511, 512, 513, 2047, 2048, 2049, 8192, 8193, 32768, 32769, MOST_CONTEXT)
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


def by_sequence(items: Ints) -> dict[int, list[list[int]]]:
    found: dict[int, list[list[int]]] = {}
    for sequence, *rest in items.tolist():
        found.setdefault(sequence, []).append(rest)
    return found


@given(sequences())
def test_chunks_cover_every_key_of_a_decoding_sequence_once_and_in_order(
    step: list[Sequence],
) -> None:
    items = decode_items(*arrays(step))
    assert items.dtype == np.int32 and items.shape[1] == attention.ITEM_INTS
    chunks = by_sequence(items)
    assert set(chunks) == {s for s, (rows, _) in enumerate(step) if rows == 1}
    for sequence, own in chunks.items():
        firsts, ends = [first for first, _, _ in own], [end for _, end, _ in own]
        assert firsts == [0, *ends[:-1]] and ends[-1] == step[sequence][1]
        assert all(first < end for first, end in zip(firsts, ends, strict=True))


@given(sequences())
def test_a_chunk_knows_its_number_and_how_many_there_are(step: list[Sequence]) -> None:
    for own in by_sequence(decode_items(*arrays(step))).values():
        assert len(own) <= MAX_CHUNKS
        assert [part & 0xFFFF for _, _, part in own] == list(range(len(own)))
        assert {part >> 16 for _, _, part in own} == {len(own)}


@given(sequences())
def test_chunks_of_a_sequence_are_neighbours_and_long_ones_come_first(step: list[Sequence]) -> None:
    items = decode_items(*arrays(step))
    runs = 1 + np.count_nonzero(np.diff(items[:, 0])) if len(items) else 0
    assert runs == len(set(items[:, 0].tolist()))
    lengths = chunk_length(arrays(step)[1][items[:, 0]])
    assert (np.diff(lengths) <= 0).all()


@given(sequences(), st.data())
def test_how_a_sequence_is_cut_depends_on_its_own_context_alone(
    step: list[Sequence], data: st.DataObject
) -> None:
    q_start, context = arrays(step)
    chunks = by_sequence(decode_items(q_start, context))
    for sequence, own in chunks.items():
        alone = decode_items(*arrays([step[sequence]]))
        assert [rest for _, *rest in alone.tolist()] == own
    order = data.draw(st.permutations(range(len(step))))
    shuffled = by_sequence(decode_items(*arrays([step[i] for i in order])))
    assert {order[i]: own for i, own in shuffled.items()} == chunks


@given(st.lists(contexts, min_size=1))
def test_chunks_begin_on_whole_tiles_and_grow_with_the_context(keys: list[int]) -> None:
    context = np.array(sorted(keys), dtype=np.int32)
    length = chunk_length(context)
    assert length.dtype == np.int32
    assert (length % 64 == 0).all() and (length >= 64).all()
    assert (np.diff(length) >= 0).all()
    assert (-(-context // length) <= MAX_CHUNKS).all()


def test_short_contexts_are_not_split_and_middling_ones_spread_over_the_card() -> None:
    context = np.array([1, 64, 65, 512, 2048, 8192, 32768], dtype=np.int32)
    counts = -(-context // chunk_length(context))
    assert counts.tolist() == [1, 1, 2, 8, 16, 32, 64]


@given(sequences(), st.sampled_from((16, 32, 64, 128)))
def test_tiles_cover_every_row_of_a_prompt_once(step: list[Sequence], tokens: int) -> None:
    q_start, context = arrays(step)
    items = prefill_items(q_start, context, tokens)
    assert items.dtype == np.int32 and items.shape[1] == attention.TILE_INTS
    tiles = by_sequence(items)
    assert set(tiles) == {s for s, (rows, _) in enumerate(step) if rows > 1}
    for sequence, own in tiles.items():
        firsts = sorted(first for (first,) in own)
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
    assert len(decode_items(q_start, context)) <= max_decode_items(len(live), most)
    tiles = prefill_items(q_start, context, tokens)
    assert len(tiles) <= max_prefill_items(rows, len(live), tokens)


@pytest.mark.parametrize("context", EDGES)
def test_the_bound_on_chunks_is_reached(context: int) -> None:
    most = max_decode_items(1, context)
    tried = [n for n in EDGES if n <= context]
    assert max(len(decode_items(*arrays([(1, n)]))) for n in tried) == most <= MAX_CHUNKS
    assert max_decode_items(7, context) == 7 * most


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
    assert attention.decode_smem(head_dim) <= 99 << 10, "of the smallest card"
    assert attention.prefill_smem(group, head_dim) <= 99 << 10


def test_the_source_has_the_same_constants() -> None:
    source = (nvrtc.SOURCES / attention.ATTENTION).read_text()
    assert f"#define MAX_CHUNKS {MAX_CHUNKS}\n" in source
    rope = (nvrtc.SOURCES / attention.ROPE).read_text()
    assert f"#define THREADS {attention.ROPE_THREADS}\n" in rope
