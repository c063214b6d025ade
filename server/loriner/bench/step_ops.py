"""The kernels of a step besides the base's linears: adapters, attention, norm, sampler.

Knows how each is called, as `kernel_ops.py` does for the linears. Bytes are what must be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loriner import kernels
from loriner.bench.kernel_ops import LINEARS, Fused, dequantized
from loriner.bench.random_adapters import RandomAdapters
from loriner.bench.random_base import RandomBase
from loriner.core import SamplingParams
from loriner.engine.sampler import sample
from loriner.engine.step_input import Draw
from loriner.kernels.operands import AttentionPlan, LoraGroup, LoraPart, Segment

BLOCK_SIZE = 16
DRAWN = SamplingParams(temperature=0.8, top_p=0.95, top_k=50)
DRAWN_TEXT = "top-k 50, top-p 0.95"
Launch = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Op:
    """One kernel, ready to be timed."""

    name: str
    what: str  # of which size
    num_bytes: int
    launches: tuple[Launch, ...]


def step_ops(
    base: RandomBase,
    all_rows: Sequence[int],
    ranks: Sequence[int],
    context: int,
    num_threads: int,
) -> Iterator[Op]:
    """The ops of decode steps of each number of rows."""
    if base.device.type == "cuda":
        on_gpu = _CudaOps(base)
        for rows in all_rows:
            yield on_gpu.head(rows)
            yield on_gpu.sampler(rows)
        return
    on_cpu = _CpuOps(base, RandomAdapters(base.config, ranks), context, num_threads)
    for rows in all_rows:
        yield on_cpu.head(rows)
        yield on_cpu.norm(rows)
        yield on_cpu.lora(LINEARS[0], rows)
        yield on_cpu.attention(rows)
        yield on_cpu.sampler(rows)


class _CudaOps:
    """Through `kernels.cuda`. The others are seen inside a step: `bench decode --profile`."""

    def __init__(self, base: RandomBase) -> None:
        from loriner.kernels.cuda import linear
        from loriner.kernels.cuda.launch import Device

        self.config, self.device, self._cuda = base.config, base.device, linear
        self._linears = linear.Linears(Device(base.device.index or 0))
        self._head = self._linears.prepare_dense([head_weight(base)], None)

    def head(self, rows: int) -> Op:
        hidden, vocab = self.config.hidden_size, self.config.vocab_size
        x = torch.randn(rows, hidden, device=self.device).bfloat16()
        y = torch.full((rows, vocab), torch.nan, device=self.device)
        return Op(
            "lm_head",
            f"{rows} rows",
            2 * vocab * hidden + x.nbytes + y.nbytes,
            (lambda: self._linears.run(x, self._head, y, self._cuda.LOGITS, None),),
        )

    def sampler(self, rows: int) -> Op:
        from loriner.kernels.cuda.sampling import Sampler, describe

        made = Sampler(self._linears.device, self.config.vocab_size, rows)
        described = [
            describe(temperature=DRAWN.temperature, top_k=DRAWN.top_k, top_p=DRAWN.top_p, seed=row)
            for row in range(rows)
        ]
        made.load(np.concatenate(described), [0] * rows)
        logits = torch.randn(rows, self.config.vocab_size, device=self.device)
        return Op("sampler", f"{rows} rows, {DRAWN_TEXT}", logits.nbytes, (lambda: made(logits),))


class _CpuOps:
    """Through the surface that the CPU's transformer calls."""

    def __init__(
        self, base: RandomBase, adapters: RandomAdapters, context: int, num_threads: int
    ) -> None:
        self.base, self.config, self.adapters = base, base.config, adapters
        self.context = context
        self.ops = kernels.select("cpu")
        self.ops.start(num_threads)
        self._head: Any = None

    def head(self, rows: int) -> Op:
        if self._head is None:
            self._head = self.ops.prepare_dense([head_weight(self.base)], None)
        operand = self._head
        x = torch.randn(rows, self.config.hidden_size)
        num_bytes = self.ops.nbytes(operand) + x.nbytes
        return Op("lm_head", f"{rows} rows", num_bytes, (lambda: self.ops.linear(x, operand),))

    def norm(self, rows: int) -> Op:
        hidden = self.config.hidden_size
        x, weight = torch.randn(rows, hidden), torch.ones(hidden)
        return Op(
            "norm",
            f"{rows} x {hidden}",
            2 * x.nbytes,
            (lambda: self.ops.rms_norm(x, weight, 1e-5),),
        )

    def lora(self, fused: Fused, rows: int) -> Op:
        """A fused linear with each row on an adapter of its own, base included."""
        weights = fused.weights(self.base, 0)
        operand = self.ops.prepare_dense([dequantized(weights, torch.float32)], None)
        groups = [self._group(fused, index) for index in range(rows)]
        segments = [Segment(i, i + 1, group) for i, group in enumerate(groups)]
        lora = self.ops.prepare_lora(segments, rows)
        x = torch.randn(rows, weights[0].shape[1])
        adapter_bytes = sum(g.a.nbytes + sum(p.b.nbytes for p in g.parts) for g in groups)
        return Op(
            "linear + adapters",
            f"{fused.name}, {rows} rows",
            self.ops.nbytes(operand) + adapter_bytes,
            (lambda: self.ops.linear(x, operand, lora),),
        )

    def attention(self, rows: int) -> Op:
        config, width = self.config, -(-self.context // BLOCK_SIZE)
        num_kv, dim = config.num_kv_heads, config.head_dim
        k = torch.randn(rows * width, num_kv, dim, BLOCK_SIZE)
        v = torch.randn(rows * width, num_kv, BLOCK_SIZE, dim)
        q = torch.randn(rows, config.num_heads, dim)
        plan = AttentionPlan(
            spans=tuple((row, row + 1) for row in range(rows)),
            blocks=torch.randperm(rows * width, dtype=torch.int32).view(rows, width),
            sequence=torch.arange(rows, dtype=torch.int32),
            context=torch.full((rows,), self.context, dtype=torch.int32),
        )
        return Op(
            "attention",
            f"{rows} rows, context {self.context}",
            2 * rows * self.context * num_kv * dim * k.itemsize,
            (lambda: self.ops.paged_attention(q, k, v, plan, dim**-0.5),),
        )

    def sampler(self, rows: int) -> Op:
        logits = torch.randn(rows, self.config.vocab_size)
        draws = [Draw(DRAWN, row, 0, 1, (), False, {}) for row in range(rows)]
        return Op(
            "sampler",
            f"{rows} rows, {DRAWN_TEXT}",
            logits.nbytes,
            (lambda: sample(logits, draws, ()),),
        )

    def _group(self, fused: Fused, index: int) -> LoraGroup:
        modules = self.adapters.adapter(index).modules
        parts: list[LoraPart] = []
        row = offset = 0
        stacked: list[Tensor] = []
        for member in fused.members:
            weight = modules[f"model.layers.0.{member}"]
            b = weight.b.t().contiguous()
            parts.append(LoraPart(offset, row, row + weight.rank, b, weight.scaling))
            stacked.append(weight.a)
            row, offset = row + weight.rank, offset + b.shape[1]
        return LoraGroup(torch.cat(stacked), tuple(parts))


def head_weight(base: RandomBase) -> Tensor:
    """[V, H] bf16; the embedding where the two are tied."""
    tied = base.config.tie_word_embeddings
    return base.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
