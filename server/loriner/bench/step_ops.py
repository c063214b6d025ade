"""The kernels of a step besides the base's bare linears: adapters, attention, rope, norm, sampler.

Called through the surface that the model calls, as `kernel_ops.py` does for the linears; only what
differs between the devices in the operands themselves is told apart. Bytes are what must be moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loriner.bench.kernel_ops import LINEARS, Fused, Surface
from loriner.bench.random_adapters import RandomAdapters
from loriner.bench.random_base import RandomBase
from loriner.bench.seated import call_adapters
from loriner.bench.traffic import nf4_bytes
from loriner.core import SamplingParams
from loriner.engine.sampler import sample
from loriner.engine.step_input import Draw
from loriner.kernels.operands import AttentionPlan
from loriner.model.rope import tables

BLOCK_SIZE = 16
COLD_BYTES = 256 << 20  # of operands in one round: several times any L2 cache
MAX_COPIES = 32
MAX_DECODE_ROWS = 256  # steps with more are prefill, where adapters are measured in whole steps
DRAWN = SamplingParams(temperature=0.8, top_p=0.95, top_k=50)
DRAWN_TEXT = "top-k 50, top-p 0.95"
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Op:
    """One kernel, ready to be timed."""

    name: str
    what: str  # of which size
    num_bytes: int
    launches: tuple[Callable[[], object], ...]
    owner: object = None  # of memory that they only point into


def step_ops(
    base: RandomBase,
    all_rows: Sequence[int],
    ranks: Sequence[int],
    context: int,
    num_threads: int,
) -> Iterator[Op]:
    """The ops of decode steps of each number of rows."""
    ops = _StepOps(base, context, num_threads, max(all_rows))
    adapters = RandomAdapters(base.config, ranks)
    for rows in all_rows:
        yield from (ops.head(rows), ops.norm(rows), ops.rope(rows))
        yield from (ops.attention(rows), ops.sampler(rows))
        if rows <= MAX_DECODE_ROWS:
            for fused in LINEARS:
                yield ops.adapted(fused, rows, adapters)


def copies(num_bytes: int) -> int:
    """How many operands of this size do not fit a cache together."""
    return max(2, min(MAX_COPIES, math.ceil(COLD_BYTES / num_bytes)))


class _StepOps:
    def __init__(self, base: RandomBase, context: int, num_threads: int, max_rows: int) -> None:
        self._base, self._config, self._context = base, base.config, context
        self._kernels = Surface(base, num_threads)
        self._ops, self._on_gpu = self._kernels.ops, self._kernels.on_gpu
        self._head = self._ops.prepare_dense([head_weight(base)], None)
        if self._on_gpu:
            self._ops.configure(self._config, BLOCK_SIZE, context, max_rows)

    def head(self, rows: int) -> Op:
        x = self._kernels.random(rows, self._config.hidden_size)
        moved = self._ops.nbytes(self._head) + x.nbytes + 4 * rows * self._config.vocab_size
        return Op("lm_head", f"{rows} rows", moved, (partial(self._ops.logits, x, self._head),))

    def norm(self, rows: int) -> Op:
        hidden, device = self._config.hidden_size, self._kernels.device
        h = torch.randn(rows, hidden, device=device)
        weight = self._ops.prepare_norm(torch.ones(hidden, device=device))
        moved = h.nbytes + rows * hidden * self._kernels.dtype.itemsize
        launch = partial(self._ops.rms_norm, h, weight, EPS)
        return Op("norm", f"{rows} x {hidden}", moved, (launch,))

    def rope(self, rows: int) -> Op:
        """Every row at the end of its context, in a block of its own."""
        k, v = self._caches(rows)
        qkv = self._kernels.random(rows, self._width(2))
        angles = self._ops.prepare_rope(*tables(self._config, self._context))
        rotation = self._ops.rotation(angles, self._indices(np.full(rows, self._context - 1)))
        slots = self._indices(np.arange(rows) * BLOCK_SIZE)
        launch = partial(self._ops.rope_store, qkv, None, EPS, rotation, slots, k, v)
        return Op("rope and store", f"{rows} rows", 2 * qkv.nbytes, (launch,))

    def attention(self, rows: int) -> Op:
        config, width = self._config, -(-self._context // BLOCK_SIZE)
        itemsize = self._kernels.dtype.itemsize
        moved = 2 * rows * self._context * config.num_kv_heads * config.head_dim * itemsize
        count = copies(moved)
        k, v = self._caches(count * rows * width)
        blocks = torch.randperm(count * rows * width, dtype=torch.int32).view(count, rows, width)
        q = self._kernels.random(rows, self._width(0))
        if not self._on_gpu:
            q = q.view(rows, config.num_heads, config.head_dim)
        plans = [self._plan(table) for table in blocks]
        scale = config.head_dim**-0.5
        attend = self._ops.paged_attention
        launches = tuple(partial(attend, q, k, v, plan, scale) for plan in plans)
        return Op("attention", f"{rows} rows, context {self._context}", moved, launches)

    def sampler(self, rows: int) -> Op:
        logits = torch.randn(rows, self._config.vocab_size, device=self._kernels.device)
        draws = [Draw(DRAWN, row, 0, 1, (), False, {}) for row in range(rows)]
        launch: Callable[[], object] = partial(sample, logits, draws, ())
        if self._on_gpu:
            launch = partial(self._gpu_sampler(rows), logits)
        return Op("sampler", f"{rows} rows, {DRAWN_TEXT}", logits.nbytes, (launch,))

    def adapted(self, fused: Fused, rows: int, adapters: RandomAdapters) -> Op:
        """A fused linear of some layers, base included, each row on an adapter of its own."""
        outputs, inputs = fused.shape(self._base)
        ranks = sum(map(adapters.rank, range(rows)))
        parts = [self._base.config.linears()[f"model.layers.0.{m}"] for m in fused.members]
        moved = nf4_bytes(outputs * inputs) + 2 * ranks * sum(n + k for n, k in parts)
        layers = range(min(copies(moved), self._config.num_layers))
        calls = call_adapters(self._kernels, self._config, adapters, fused, layers, rows)
        x = self._kernels.random(rows, inputs)
        h = self._kernels.residual(fused, rows, outputs)
        prepare, launch = self._kernels.prepare, self._kernels.launch
        operands = [prepare(fused, fused.weights(self._base, layer)) for layer in layers]
        launches = tuple(
            partial(launch, fused, x, operand, h, call)
            for operand, call in zip(operands, calls.operands, strict=True)
        )
        return Op(f"{fused.name} + adapters", f"{rows} rows", moved, launches, calls.owner)

    def _width(self, parts: int) -> int:
        """Columns of q and `parts` of k and v."""
        heads = self._config.num_heads + parts * self._config.num_kv_heads
        return heads * self._config.head_dim

    def _caches(self, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, with numbers in them."""
        config = self._config
        heads, dim = (num_blocks, config.num_kv_heads), config.head_dim
        shapes = ((*heads, dim, BLOCK_SIZE), (*heads, BLOCK_SIZE, dim))
        if self._on_gpu:
            shapes = tuple(s[1:] for s in self._ops.kv_shapes(config, num_blocks, BLOCK_SIZE))
        device, dtype = self._kernels.device, self._kernels.dtype
        k, v = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
        return k, v

    def _plan(self, table: Tensor) -> Any:
        """Each row the newest of a sequence; `table` [rows, blocks] i32."""
        rows = len(table)
        if not self._on_gpu:
            return AttentionPlan(
                spans=tuple((row, row + 1) for row in range(rows)),
                blocks=table,
                sequence=torch.arange(rows, dtype=torch.int32),
                context=torch.full((rows,), self._context, dtype=torch.int32),
            )
        starts, context = np.arange(rows + 1, dtype=np.int32), np.full(rows, self._context)
        context = context.astype(np.int32)
        items, _ = self._ops.work_lists(starts, context)
        step = SimpleNamespace(
            q_start=self._indices(starts),
            context=self._indices(context),
            block_table=table.to(self._kernels.device),
            attn_items=self._indices(items),
            num_attn_items=self._indices(np.array([len(items)])),
            num_tile_items=self._indices(np.zeros(1)),
        )
        return self._ops.attention_plan(step, False)

    def _indices(self, values: Any) -> Tensor:
        dtype = torch.int32 if self._on_gpu else torch.int64
        return torch.from_numpy(values).to(self._kernels.device, dtype)

    def _gpu_sampler(self, rows: int) -> Callable[[Tensor], None]:
        from loriner.kernels.cuda.sampling import Sampler, describe

        made = Sampler(self._ops.device, self._config.vocab_size, rows)
        described = [
            describe(temperature=DRAWN.temperature, top_k=DRAWN.top_k, top_p=DRAWN.top_p, seed=row)
            for row in range(rows)
        ]
        made.load(np.concatenate(described), [0] * rows)
        return made


def head_weight(base: RandomBase) -> Tensor:
    """[V, H] bf16; the embedding where the two are tied."""
    tied = base.config.tie_word_embeddings
    return base.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
