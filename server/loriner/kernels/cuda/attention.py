"""RoPE with the KV write, paged decode and prefill: work lists from numpy arrays, and the launches.

Written in CUDA C++ (csrc/rope.cu, csrc/attention.cu): Triton cannot hand the last block of a
sequence the others' parts, nor keep copies of pages in flight across sequences. Knows no engine.
Invariant: how a sequence is cut follows from its own context alone, so neighbours cannot change its
result.
"""

from __future__ import annotations

import math
from ctypes import c_int64

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loriner.kernels.cuda.launch import Argument, Device

ATTENTION, ROPE = "attention.cu", "rope.cu"
MAX_CHUNKS = 64  # of one sequence
ITEM_INTS, TILE_INTS = 8, 2  # int32 values of a decode item, of a prefill tile
DECODE_STAGES, TILE_KEYS = 2, 16  # tiles that a warp has in shared memory in decode, their keys
COST_KEYS = 32  # keys of a unit of cost; the end of a chunk costs one
_UNIT = 64  # keys: chunks are whole tiles for each warp of a block
MOST_HEADS = 8  # query heads that decode sees to at a time
ROPE_THREADS = 128
# Contexts up to the first number are cut into chunks of the second; longer ones, into MAX_CHUNKS;
# the shortest are not cut: to add up two parts takes as long as to read so many keys.
_WHOLE = 256 + TILE_KEYS
_CHUNKS = ((2048, 128), (8192, 256), (32768, 512))

Ints = NDArray[np.int32]


def chunk_length(context: Ints) -> Ints:
    """Keys of one decode chunk, for each context: at most MAX_CHUNKS chunks, short ones for short
    contexts, so that a single sequence is spread over the card."""
    length = -(-context // (MAX_CHUNKS * _UNIT)) * _UNIT
    for limit, keys in reversed(_CHUNKS):
        length = np.where(context <= limit, keys, length)
    whole = np.maximum(-(-(context - TILE_KEYS) // _UNIT), 1) * _UNIT
    return np.where(context <= _WHOLE, whole, length).astype(np.int32)


def count_chunks(context: Ints) -> Ints:
    """How many chunks each context has; a last one of a tile at most goes to the one before."""
    counts: Ints = np.maximum(-(-(context - TILE_KEYS) // chunk_length(context)), 1)
    return counts


def decode_items(q_start: Ints, context: Ints) -> Ints:
    """The work list of the sequences with exactly one row.

    q_start [S+1], context [S]. Returns [n + 1, 8] int32, or nothing for none: (n, their cost, their
    chunks), then of each (sequence, its row, context, keys of a chunk, what the sequences before it
    cost, its own cost, how many chunks those have, its number of chunks), all for one head.
    """
    sequences = np.flatnonzero(np.diff(q_start) == 1)
    keys = context[sequences]
    length = chunk_length(keys)
    counts = count_chunks(keys)
    last = keys - (counts - 1) * length
    costs = ((counts - 1) * length + -(-last // _UNIT) * _UNIT) // COST_KEYS + counts
    made = np.zeros((len(sequences) + 1, ITEM_INTS), dtype=np.int32)
    made[0, :3] = len(sequences), costs.sum(), counts.sum()
    items = made[1:]
    items[:, 0], items[:, 1], items[:, 2], items[:, 3] = sequences, q_start[sequences], keys, length
    items[:, 4], items[:, 5] = costs.cumsum() - costs, costs
    items[:, 6], items[:, 7] = counts.cumsum() - counts, counts
    return made if len(sequences) else made[:0]


def prefill_items(q_start: Ints, context: Ints, tokens: int) -> Ints:
    """The work list of the sequences with more than one row, in tiles of `tokens` rows.

    q_start [S+1], context [S]. Returns [n, 2] int32: (sequence, first row), most keys first.
    """
    rows = np.diff(q_start)
    sequences = np.flatnonzero(rows > 1)
    counts = -(-rows[sequences] // tokens)
    which = np.arange(len(sequences)).repeat(counts)
    tile = np.arange(len(which)) - (counts.cumsum() - counts)[which]
    items = np.empty((len(which), TILE_INTS), dtype=np.int32)
    items[:, 0] = sequences[which]
    items[:, 1] = q_start[items[:, 0]] + tile * tokens
    last = np.minimum(items[:, 1] + tokens, q_start[items[:, 0] + 1])
    keys = context[items[:, 0]] - (q_start[items[:, 0] + 1] - last)
    order: Ints = items[np.argsort(-keys, kind="stable")]
    return order


def max_decode_items(max_sequences: int) -> int:
    """The longest decode list of so many sequences."""
    return max_sequences + 1


def max_chunks(max_sequences: int, max_context: int) -> int:
    """Most chunks of so many sequences in decode."""
    at = [limit for limit, _ in _CHUNKS if limit < max_context] + [max_context]
    contexts = np.array(at, dtype=np.int32)
    return max_sequences * int(count_chunks(contexts).max())


def max_prefill_items(max_rows: int, max_sequences: int, tokens: int) -> int:
    """The longest prefill list of so many rows in so many sequences."""
    sequences = min(max_sequences, max_rows // 2)
    return min(max_rows // 2, max_rows // tokens + sequences)


def tile_tokens(group: int, head_dim: int) -> int:
    """Rows of one prefill tile (attention.cu: P_TOKENS)."""
    warps = _prefill_warps(head_dim)
    return 16 * (warps // _heads(group, warps))


class Attention:
    """The attention kernels of one model shape, and decode's workspace, which all layers share.

    Launches that use one workspace must not overlap: one step at a time, on one stream.
    """

    def __init__(
        self,
        device: Device,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        max_chunks: int,
        scale: float | None = None,
    ) -> None:
        """max_chunks: of a step in decode (`max_chunks`). scale: of q k^T, 1/sqrt(D) unless
        given."""
        group = num_heads // num_kv_heads
        _check_shape(num_heads, num_kv_heads, head_dim, block_size)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.tile_tokens = tile_tokens(group, head_dim)
        self._scale = (scale or head_dim**-0.5) * math.log2(math.e)
        shape = {"HEAD_DIM": head_dim, "BLOCK_SIZE": block_size}
        module = device.module(ATTENTION, GROUP=group, **shape)
        self._rope = device.module(ROPE, **shape).kernel("rope_store")
        self._decode = module.kernel("decode_attention", decode_smem(group, head_dim))
        self._prefill = module.kernel("prefill_attention", prefill_smem(group, head_dim))
        self._decode_threads = _decode_warps(head_dim) * 32
        warps = _prefill_warps(head_dim)
        heads = _heads(group, warps)
        self._prefill_threads = warps // heads * heads * 32
        self._decode_grid = device.num_sms * self._decode.max_blocks_per_sm(self._decode_threads)
        self._prefill_grid = device.num_sms * self._prefill.max_blocks_per_sm(self._prefill_threads)
        self._lanes = 1 << (head_dim // 16 - 1).bit_length()
        self._blocks = MAX_CHUNKS * num_kv_heads * _split(group)  # that a sequence may make use of
        slots = max_chunks * num_kv_heads * _split(group)
        rows = slots * _heads(group, MOST_HEADS)
        on = device.torch_device
        self._part = torch.empty(rows * head_dim, dtype=torch.float32, device=on)
        self._state = torch.empty(rows, 2, dtype=torch.float32, device=on)
        self._tickets = torch.zeros(slots, dtype=torch.int32, device=on)

    def rope_store(
        self,
        qkv: Tensor,
        positions: Tensor,
        slots: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Semantics: q = rope(norm(q)); k_cache[slot], v_cache[slot] = rope(norm(k)), v; norm is
        RMSNorm over each head where weights are given (both or none).

        qkv [T, (Hq + 2 Hkv) D] bf16, q in place, k and v unchanged; positions, slots [T] i32, slot
        -1: not stored; cos, sin [max_len, D/2] f32; caches [blocks, Hkv, size, D] bf16, written;
        norms [D] f32. Source: arXiv 2104.09864, eq. 34, with pairs (i, i + D/2).
        """
        assert (q_norm is None) == (k_norm is None)
        rows = qkv.shape[0]
        threads = rows * (self.num_heads + 2 * self.num_kv_heads) * self._lanes
        self._rope(
            -(-threads // ROPE_THREADS),
            ROPE_THREADS,
            *(qkv, positions, slots, cos, sin, _or_null(q_norm), _or_null(k_norm), float(eps)),
            *(k_cache, v_cache, rows, self.num_heads, self.num_kv_heads),
        )

    def decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        items: Tensor,
        num_items: Tensor,
        block_table: Tensor,
        out: Tensor,
    ) -> None:
        """Semantics: out[t] = softmax(scale * q[t] K^T) V over all keys of t's sequence, for the
        sequences in `items`; other rows of out stay as they are (arXiv 1706.03762, eq. 1). Keys and
        values before a row's own position are read before the launch ahead of this one ends.

        q [T, >= Hq D] bf16: the first columns of a row are read, rows may be strided; caches as in
        `rope_store`; items [.., 8] i32 from `decode_items`, num_items [1] i32: its length;
        block_table [S, W] i32; out [T, Hq D] bf16. The lists and block_table must be there before
        the kernel ahead of this one began: they are read early.
        """
        self._decode(
            min(self._decode_grid, len(items) * self._blocks),
            self._decode_threads,
            *(q, q.stride(0), k_cache, v_cache, items, num_items, block_table),
            *(block_table.stride(0), self.num_kv_heads, self._scale, out),
            *(self._part, self._state, self._tickets),
        )

    def prefill(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        items: Tensor,
        num_items: Tensor,
        q_start: Tensor,
        context: Tensor,
        block_table: Tensor,
        out: Tensor,
    ) -> None:
        """Semantics: as `decode`, for rows t of sequences with several: row t sees the first
        context[s] - (q_start[s+1] - 1 - t) keys, which are in the cache, its own included.

        items [n, 2] i32 from `prefill_items` with `tile_tokens`, num_items [1]; context [S] i32.
        """
        self._prefill(
            self._prefill_grid,
            self._prefill_threads,
            *(q, q.stride(0), k_cache, v_cache, items, num_items, q_start, context),
            *(block_table, block_table.stride(0), self.num_kv_heads, self._scale, out),
        )


def decode_smem(group: int, head_dim: int) -> int:
    """Bytes of dynamic shared memory (feed.cuh: D_WARP_BYTES for each warp)."""
    stage = (2 * TILE_KEYS + _heads(group, MOST_HEADS)) * _row_bytes(head_dim) + 16
    warp = DECODE_STAGES * stage + (head_dim // 16 + 1) * 512
    return _decode_warps(head_dim) * -(-warp // 128) * 128


def prefill_smem(group: int, head_dim: int) -> int:
    """Bytes of dynamic shared memory (attention.cu: P_SMEM)."""
    keys = 32 if head_dim > 128 else 64
    warps = _prefill_warps(head_dim)
    heads = _heads(group, warps)
    return (4 * keys + warps // heads * heads * 16) * _row_bytes(head_dim)


def _row_bytes(head_dim: int) -> int:
    return head_dim * 2 + (16 if head_dim % 64 else 0)


def _decode_warps(head_dim: int) -> int:
    return 2 if head_dim > 128 else 4


def _split(group: int) -> int:
    """How often decode reads a KV head."""
    return -(-group // MOST_HEADS)


def _prefill_warps(head_dim: int) -> int:
    return 4 if head_dim > 128 else 8


def _heads(group: int, most: int) -> int:
    """Query heads that a block sees to: a group is split evenly where it has more than `most`."""
    return -(-group // -(-group // most))


def _check_shape(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> None:
    if num_heads % num_kv_heads or not 1 <= num_heads // num_kv_heads <= 16:
        raise ValueError(f"{num_heads} heads for {num_kv_heads} KV heads: not a group of 1 to 16")
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ValueError(f"head dim {head_dim} is not a multiple of 16 up to 256")
    if block_size not in (8, 16, 32):
        raise ValueError(f"block size {block_size} is not 8, 16 or 32")


def _or_null(tensor: Tensor | None) -> Argument:
    return c_int64(0) if tensor is None else tensor
