"""RoPE with the KV write, and paged attention, on the GPU against float64.

Everything that must not be read is not a number: cells beyond a context, blocks of nobody, outputs
before they are written.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from loriner.kernels.cuda.attention import (
    Attention,
    decode_items,
    max_chunks,
    max_decode_items,
    max_prefill_items,
    prefill_items,
)
from tests.gpu.operands import POISON, error

pytestmark = pytest.mark.gpu

CONTEXTS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 513, 1025, 5000)
PROMPTS = (  # rows of this step, keys that the last one sees
    *((2, 2), (15, 15), (16, 16), (17, 17), (33, 64), (64, 65), (65, 129), (127, 127)),
    *((128, 255), (129, 1025), (40, 5000), (513, 513), (2, 1025)),
)
MIXED = ((1, 300), (40, 129), (1, 1), (2, 5000), (1, 5000), (0, 0), (17, 17), (1, 64), (0, 0))
MOST_SEQUENCES, MOST_CONTEXT, MOST_ROWS = 320, 46080, 2048
TOLERANCE = 4e-3  # bf16 out, and bf16 weights of the values
ROTATED = 2.5e-3  # bf16 out
EPS = 1e-6
POISON_BF16 = torch.tensor(POISON, dtype=torch.bfloat16)


class Shape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def columns(self) -> int:
        """Of q|k|v."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


SHAPES = (
    *(Shape(32, 8, 128, 16), Shape(9, 3, 64, 16), Shape(4, 2, 64, 32), Shape(8, 8, 128, 16)),
    *(Shape(16, 1, 256, 16), Shape(12, 1, 128, 32), Shape(14, 2, 80, 8)),
)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))


class Slots:
    """A cache by slot."""

    def __init__(self, cache: Tensor, size: int) -> None:
        self.cache, self.size = cache, size

    def __setitem__(self, slots: Tensor, rows: Tensor) -> None:
        self.cache[slots // self.size, :, slots % self.size] = rows

    def __getitem__(self, slots: Tensor) -> Tensor:
        return self.cache[slots // self.size, :, slots % self.size]


class Cache:
    """Keys and values of some sequences in shuffled blocks, with blocks of nobody between."""

    def __init__(self, shape: Shape, contexts: Sequence[int], place: torch.device) -> None:
        self.shape, self.contexts, self.place = shape, contexts, place
        size = shape.block_size
        counts = [-(-context // size) for context in contexts]
        order = torch.randperm(sum(counts) + 5).tolist()
        self.nobodys = order.pop()
        self.table = torch.full((len(contexts), MOST_CONTEXT // size), self.nobodys)
        cells = (len(order) + 1, shape.num_kv_heads, size, shape.head_dim)
        self.k = torch.full(cells, POISON, dtype=torch.bfloat16, device=place)
        self.v = self.k.clone()
        self.keys, self.values = [], []
        for i, (context, count) in enumerate(zip(contexts, counts, strict=True)):
            blocks = torch.tensor([order.pop() for _ in range(count)], dtype=torch.long)
            self.table[i, :count] = blocks
            drawn = torch.randn(2, context, shape.num_kv_heads, shape.head_dim, device=place)
            drawn = drawn.bfloat16()
            self.keys.append(drawn[0])
            self.values.append(drawn[1])
            slots = self.slots(i, range(context))
            self.rows_of(self.k)[slots], self.rows_of(self.v)[slots] = drawn[0], drawn[1]

    def slots(self, sequence: int, positions: Sequence[int]) -> Tensor:
        """block * size + offset of each position."""
        at, size = torch.tensor(list(positions), dtype=torch.long), self.shape.block_size
        return (self.table[sequence, at // size] * size + at % size).to(self.place)

    def rows_of(self, cache: Tensor) -> Slots:
        """A cache as [slots, Hkv, D]."""
        return Slots(cache, self.shape.block_size)


class Plan(NamedTuple):
    """A step's lists on the device, i32, of fixed sizes."""

    q_start: Tensor
    context: Tensor
    table: Tensor
    items: Tensor
    num_items: Tensor
    tiles: Tensor
    num_tiles: Tensor


class Part(NamedTuple):
    """What a step does for one sequence of the cache; `sequence` -1: padding."""

    rows: int
    sequence: int


def padded(items: np.ndarray[Any, Any], count: int) -> Tensor:
    made = torch.full((count, items.shape[1]), -1, dtype=torch.int32)
    made[: len(items)] = torch.from_numpy(items)
    return made


def plan_of(attention: Attention, cache: Cache, parts: Sequence[Part]) -> Plan:
    contexts = [cache.contexts[p.sequence] if p.rows else 0 for p in parts]
    q_start = np.cumsum([0, *(p.rows for p in parts)]).astype(np.int32)
    context = np.array(contexts, dtype=np.int32)
    table = torch.stack(
        [cache.table[p.sequence] if p.rows else cache.table[0] * 0 + cache.nobodys for p in parts]
    )
    items = decode_items(q_start, context)
    tiles = prefill_items(q_start, context, attention.tile_tokens)
    most = max_prefill_items(MOST_ROWS, MOST_SEQUENCES, attention.tile_tokens)
    tensors = (
        torch.from_numpy(q_start),
        torch.from_numpy(context),
        table.int(),
        padded(items, max_decode_items(MOST_SEQUENCES)),
        torch.tensor([len(items)], dtype=torch.int32),
        padded(tiles, most),
        torch.tensor([len(tiles)], dtype=torch.int32),
    )
    return Plan(*(tensor.to(cache.place) for tensor in tensors))


def poisoned(rows: int, cache: Cache) -> Tensor:
    columns = cache.shape.num_heads * cache.shape.head_dim
    return torch.full((rows, columns), POISON, dtype=torch.bfloat16, device=cache.place)


def attend(
    attention: Attention, q: Tensor, cache: Cache, plan: Plan, out: Tensor | None = None
) -> Tensor:
    out = poisoned(len(q), cache) if out is None else out
    where = (q, cache.k, cache.v)
    attention.decode(*where, plan.items, plan.num_items, plan.table, out)
    attention.prefill(
        *(*where, plan.tiles, plan.num_tiles, plan.q_start, plan.context, plan.table, out)
    )
    return out


def exact(q: Tensor, cache: Cache, parts: Sequence[Part], scale: float | None = None) -> Tensor:
    """[rows of all parts, Hq D] f64, from the keys and values as they are in the cache."""
    shape, start, made = cache.shape, 0, []
    for rows, sequence in parts:
        if not rows:
            continue
        context = cache.contexts[sequence]
        own = q[start : start + rows, : shape.num_heads * shape.head_dim].double()
        own = own.view(rows, shape.num_kv_heads, shape.group, shape.head_dim)
        scores = torch.einsum("tkgd,ckd->kgtc", own, cache.keys[sequence].double())
        seen = context - rows + 1 + torch.arange(rows, device=cache.place)
        hidden = torch.arange(context, device=cache.place) >= seen[:, None]
        scores *= shape.head_dim**-0.5 if scale is None else scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        out = torch.einsum("kgtc,ckd->tkgd", weights, cache.values[sequence].double())
        made.append(out.reshape(rows, -1))
        start += rows
    return torch.cat(made)


def random_q(shape: Shape, rows: int, place: torch.device) -> Tensor:
    """q|k|v of which attention reads the first columns; the rest is not a number."""
    qkv = torch.randn(rows, shape.columns, device=place).bfloat16()
    qkv[:, shape.num_heads * shape.head_dim :] = POISON
    return qkv


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def cache_for(
    shape: Shape, step: Sequence[tuple[int, int]], place: torch.device
) -> tuple[Cache, list[Part]]:
    """A cache for (rows, context) of each sequence, and the step over it."""
    contexts = [context for rows, context in step if rows]
    number = iter(range(len(contexts)))
    return (
        Cache(shape, contexts, place),
        [Part(rows, next(number) if rows else -1) for rows, _ in step],
    )


@pytest.fixture(scope="module")
def device() -> Any:
    from loriner.kernels.cuda.launch import Device

    return Device()


@functools.cache
def attention_of(device: Any, shape: Shape, scale: float | None = None) -> Attention:
    return Attention(
        device,
        **shape._asdict(),
        max_chunks=max_chunks(MOST_SEQUENCES, MOST_CONTEXT),
        scale=scale,
    )


@each_shape
def test_decode_equals_float64(device: Any, shape: Shape) -> None:
    attention = attention_of(device, shape)
    cache, parts = cache_for(shape, [(1, n) for n in CONTEXTS] + [(0, 0)] * 2, device.torch_device)
    q = random_q(shape, len(CONTEXTS) + 3, cache.place)

    out = attend(attention, q, cache, plan_of(attention, cache, parts))

    expected = exact(q, cache, parts)
    for row, context in enumerate(CONTEXTS):
        assert error(out[row], expected[row]) < TOLERANCE, context
    assert out[len(CONTEXTS) :].isnan().all(), "rows of no sequence stay as they are"


@each_shape
def test_prefill_equals_float64(device: Any, shape: Shape) -> None:
    attention = attention_of(device, shape)
    cache, parts = cache_for(shape, [*PROMPTS, (0, 0)], device.torch_device)
    q = random_q(shape, sum(rows for rows, _ in PROMPTS) + 3, cache.place)

    out = attend(attention, q, cache, plan_of(attention, cache, parts))

    expected, start = exact(q, cache, parts), 0
    for rows, context in PROMPTS:
        span = slice(start, start + rows)
        assert error(out[span], expected[span]) < TOLERANCE, (rows, context)
        worst = max(error(out[row], expected[row]) for row in range(start, start + rows, 13))
        assert worst < 2 * TOLERANCE, (rows, context)
        start += rows
    assert out[start:].isnan().all()


@each_shape
def test_decodes_and_prompts_share_a_step(device: Any, shape: Shape) -> None:
    attention = attention_of(device, shape)
    cache, parts = cache_for(shape, MIXED, device.torch_device)
    q = random_q(shape, sum(rows for rows, _ in MIXED), cache.place)

    out = attend(attention, q, cache, plan_of(attention, cache, parts))

    assert error(out, exact(q, cache, parts)) < TOLERANCE


@each_shape
def test_a_row_does_not_depend_on_its_neighbours(device: Any, shape: Shape) -> None:
    attention = attention_of(device, shape)
    cache, parts = cache_for(shape, MIXED, device.torch_device)
    q = random_q(shape, sum(rows for rows, _ in MIXED), cache.place)
    together = attend(attention, q, cache, plan_of(attention, cache, parts))

    assert same(together, attend(attention, q, cache, plan_of(attention, cache, parts))), "again"
    starts = np.cumsum([0, *(part.rows for part in parts)]).tolist()
    spans = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
    for part, span in zip(parts, spans, strict=True):
        if part.rows:
            alone = attend(attention, q[span], cache, plan_of(attention, cache, [part]))
            assert same(alone, together[span]), part
    order = torch.randperm(len(parts)).tolist()
    moved = torch.cat([q[spans[i]] for i in order])
    plan = plan_of(attention, cache, [parts[i] for i in order])
    expected = torch.cat([together[spans[i]] for i in order])
    assert same(attend(attention, moved, cache, plan), expected)


@each_shape
@pytest.mark.parametrize("most", [20, 700, 3000])
def test_rows_among_hundreds_are_as_they_are_alone(device: Any, shape: Shape, most: int) -> None:
    """Where there are more chunks than thread blocks, warps share heads in other places with every
    batch; alone, a block has a chunk."""
    attention = attention_of(device, shape)
    contexts = torch.randint(1, most, (MOST_SEQUENCES,)).tolist()
    cache, parts = cache_for(shape, [(1, n) for n in contexts], device.torch_device)
    q = random_q(shape, len(parts), cache.place)
    plan = plan_of(attention, cache, parts)

    out = attend(attention, q, cache, plan)

    assert error(out, exact(q, cache, parts)) < TOLERANCE
    assert same(out, attend(attention, q, cache, plan)), "again"
    for count in (1, 3, 50, 299):
        own = slice(MOST_SEQUENCES - count, MOST_SEQUENCES)
        fewer = attend(attention, q[own], cache, plan_of(attention, cache, parts[own]))
        assert same(fewer, out[own]), count


@pytest.mark.parametrize(
    ("shape", "contexts"),
    [
        (Shape(14, 2, 80, 8), (300, 10000)),
        (Shape(14, 2, 80, 8), (266, 10000)),
        (Shape(32, 8, 128, 16), (600, 45000)),
        (Shape(16, 1, 256, 16), (560, 45000)),
    ],
    ids=str,
)
def test_long_contexts_behind_short_ones_read_their_own_pages(
    device: Any, shape: Shape, contexts: tuple[int, int]
) -> None:
    """Chunks of long contexts are so long that some warps begin in another group of 32 pages."""
    attention = attention_of(device, shape)
    cache, parts = cache_for(shape, [(1, n) for n in contexts * 8], device.torch_device)
    q = random_q(shape, len(parts), cache.place)

    out = attend(attention, q, cache, plan_of(attention, cache, parts))

    assert error(out, exact(q, cache, parts)) < TOLERANCE
    for i, part in enumerate(parts):
        alone = attend(attention, q[i : i + 1], cache, plan_of(attention, cache, [part]))
        assert same(alone, out[i : i + 1]), part


def test_scores_far_apart_and_another_scale(device: Any) -> None:
    shape, scale = SHAPES[1], 1.0
    attention = attention_of(device, shape, scale)
    cache, parts = cache_for(shape, [(1, 1025), (40, 513)], device.torch_device)
    q = random_q(shape, 41, cache.place) * 4

    out = attend(attention, q, cache, plan_of(attention, cache, parts))

    assert error(out, exact(q, cache, parts, scale)) < TOLERANCE


# ---- RoPE and the KV write ----


class Tables(NamedTuple):
    cos: Tensor  # [MOST_CONTEXT, D/2] f32
    sin: Tensor
    q_norm: Tensor | None  # [D] f32
    k_norm: Tensor | None


def tables_of(shape: Shape, place: torch.device, *, normed: bool) -> Tables:
    half = shape.head_dim // 2
    rates = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(MOST_CONTEXT)[:, None] * rates
    norms = [(torch.rand(shape.head_dim) + 0.5).to(place) if normed else None for _ in range(2)]
    return Tables(angles.cos().float().to(place), angles.sin().float().to(place), *norms)


def rotated(x: Tensor, positions: Tensor, tables: Tables, norm: Tensor | None) -> Tensor:
    """x [T, heads, D] -> the same f64, normed and rotated."""
    x = x.double()
    if norm is not None:
        x = x * norm.double() / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt()
    at = positions.long()
    cos, sin = tables.cos[at].double()[:, None], tables.sin[at].double()[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def store(
    attention: Attention,
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: Cache,
    tables: Tables,
) -> None:
    args = (tables.q_norm, tables.k_norm, EPS) if tables.q_norm is not None else ()
    attention.rope_store(
        qkv, positions.int(), slots.int(), tables.cos, tables.sin, cache.k, cache.v, *args
    )


def split(qkv: Tensor, shape: Shape) -> list[Tensor]:
    """q, k and v [T, heads, D]."""
    heads = qkv.view(len(qkv), -1, shape.head_dim)
    return list(heads.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 33, 257])
@each_shape
def test_rope_store_equals_float64(device: Any, shape: Shape, rows: int, normed: bool) -> None:
    attention, place = attention_of(device, shape), device.torch_device
    tables = tables_of(shape, place, normed=normed)
    cache = Cache(shape, [16] * 40, place)
    num_slots = len(cache.k) * shape.block_size
    slots = torch.randperm(num_slots, device=place)[:rows]
    slots[torch.rand(rows, device=place) < 0.2] = -1
    positions = torch.randint(0, MOST_CONTEXT, (rows,), device=place)
    qkv = torch.randn(rows, shape.columns, device=place).bfloat16() * 3
    given, before = qkv.clone(), (cache.k.clone(), cache.v.clone())

    store(attention, qkv, positions, slots, cache, tables)

    (q, k, v), found = split(given, shape), split(qkv, shape)
    assert error(found[0], rotated(q, positions, tables, tables.q_norm)) < ROTATED
    assert same(found[1].contiguous(), k.contiguous()), "keys stay as they are in q|k|v"
    assert same(found[2].contiguous(), v.contiguous()), "and values"
    kept = slots >= 0
    if kept.any():
        expected = rotated(k, positions, tables, tables.k_norm)[kept]
        assert error(cache.rows_of(cache.k)[slots[kept]], expected) < ROTATED
    for cells, old, new in ((cache.k, before[0], None), (cache.v, before[1], v)):
        written = cache.rows_of(cells)[slots[kept]]
        assert new is None or same(written.contiguous(), new[kept].contiguous())
        cache.rows_of(cells)[slots[kept]] = cache.rows_of(old)[slots[kept]]
        assert same(cells, old), "no other cell is touched"


def test_a_row_is_rotated_alike_alone_and_among_others(device: Any) -> None:
    for shape in SHAPES:
        attention, place = attention_of(device, shape), device.torch_device
        tables = tables_of(shape, place, normed=True)
        cache = Cache(shape, [64], place)
        slots, positions = cache.slots(0, range(64)), torch.arange(64, device=place) * 11
        qkv = torch.randn(64, shape.columns, device=place).bfloat16()
        alone = qkv.clone()
        store(attention, qkv, positions, slots, cache, tables)
        keys, values = cache.k.clone(), cache.v.clone()
        for row in range(0, 64, 9):
            one = slice(row, row + 1)
            store(attention, alone[one], positions[one], slots[one], cache, tables)
            assert same(alone[one], qkv[one])
        assert same(cache.k, keys) and same(cache.v, values)


# ---- a whole step, in a graph ----


def rows_of_step(cache: Cache, parts: Sequence[Part], rows: int) -> tuple[Tensor, Tensor]:
    """positions and slots of a step's rows, padded."""
    positions = torch.zeros(rows, dtype=torch.int32, device=cache.place)
    slots = torch.full((rows,), -1, dtype=torch.int32, device=cache.place)
    start = 0
    for count, sequence in parts:
        if count:
            at = range(cache.contexts[sequence] - count, cache.contexts[sequence])
            positions[start : start + count] = torch.tensor(at)
            slots[start : start + count] = cache.slots(sequence, at)
        start += count
    return positions, slots


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4]])
def test_one_graph_serves_any_step(device: Any, shape: Shape) -> None:
    attention, place, rows = attention_of(device, shape), device.torch_device, 96
    tables = tables_of(shape, place, normed=False)
    steps = (
        ((1, 0), (40, 1), (1, 2), (17, 3), (0, -1), (0, -1)),
        ((1, 3), (1, 2), (1, 1), (1, 0), (1, 4), (0, -1)),
        ((60, 4), (2, 3), (33, 1), (1, 0), (0, -1), (0, -1)),
        ((0, -1),) * 6,
    )
    cache = Cache(shape, [5000, 40, 129, 513, 1025], place)
    drawn = (cache.k.clone(), cache.v.clone())
    old_keys, old_values = list(cache.keys), list(cache.values)
    static = plan_of(attention, cache, [Part(*part) for part in steps[0]])
    qkv = torch.zeros(rows, shape.columns, device=place).bfloat16()
    positions, slots = rows_of_step(cache, [], rows)

    out = poisoned(rows, cache)

    def step() -> None:
        store(attention, qkv, positions, slots, cache, tables)
        attend(attention, qkv, cache, static, out)

    positions, slots = rows_of_step(cache, [Part(*part) for part in steps[0]], rows)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for described in (*steps, steps[0]):
        parts = [Part(*part) for part in described]
        used = sum(part.rows for part in parts)
        for fixed, new in zip(static, plan_of(attention, cache, parts), strict=True):
            fixed.copy_(new)
        for fixed, new in zip((positions, slots), rows_of_step(cache, parts, rows), strict=True):
            fixed.copy_(new)
        qkv.copy_(torch.randn(rows, shape.columns))
        out.fill_(POISON)
        cache.keys, cache.values = list(old_keys), list(old_values)
        for cells, before in zip((cache.k, cache.v), drawn, strict=True):
            cells.copy_(before)
            cache.rows_of(cells)[slots[:used].long()] = POISON_BF16.to(place)
        q, k, v = split(qkv.clone(), shape)
        keys = rotated(k, positions, tables, None).bfloat16()
        start = 0
        for count, sequence in parts:
            if count:
                span, new_from = slice(start, start + count), cache.contexts[sequence] - count
                cache.keys[sequence] = torch.cat((old_keys[sequence][:new_from], keys[span]))
                cache.values[sequence] = torch.cat((old_values[sequence][:new_from], v[span]))
            start += count

        graph.replay()

        assert out[used:].isnan().all()
        if used:
            turned = rotated(q, positions, tables, None).bfloat16().view(rows, -1)
            expected = exact(turned, cache, parts)
            assert error(out[:used], expected) < 1.25 * TOLERANCE, described
