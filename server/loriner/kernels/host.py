"""The surface that the model calls, on a CPU: composed of the plain functions of `cpu.py` or
`reference.py`. The GPU's is `cuda/backend.py`. f32 activations; keeps no state between calls."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from loriner.kernels.operands import AttentionPlan, LoraEmbedding, Nf4, Segment

Rotation = tuple[Tensor, Tensor]  # cos, sin [T, 1, D] of the step's rows


class HostKernels:
    """Semantics are `reference.py`'s; `raw` is the module that computes."""

    def __init__(self, raw: ModuleType) -> None:
        self.raw = raw

    def start(self, num_threads: int) -> str:
        """Get ready to compute; says what will."""
        return str(self.raw.start(num_threads))

    def nbytes(self, operand: Any) -> int:
        """Bytes that an operand keeps resident."""
        return int(self.raw.nbytes(operand))

    def prepare_nf4(self, parts: Sequence[Nf4], bias: Tensor | None, *, gated: bool = False) -> Any:
        """Fuse NF4 weights along their outputs. A block of 64 lies in one row, so their bytes just
        follow each other. `gated`: the parts are gate and up, for `linear_gated`."""
        shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        packed = torch.cat([part.packed for part in parts])
        absmax = torch.cat([part.expanded() for part in parts])
        return self.raw.prepare_nf4(packed, absmax, parts[0].code, shape, bias)

    def prepare_dense(
        self, weights: Sequence[Tensor], bias: Tensor | None, *, gated: bool = False
    ) -> Any:
        """Fuse dense weights [n, K] along their outputs."""
        weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        return self.raw.prepare_dense(weight, bias)

    def prepare_norm(self, weight: Tensor) -> Tensor:
        return weight.float()

    def prepare_embedding(self, weight: Tensor) -> Tensor:
        return weight

    def prepare_rope(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Tables [max_len, D] of `model/rope.py`."""
        return cos, sin

    def prepare_lora(self, segments: Sequence[Segment], num_rows: int) -> Any:
        return self.raw.prepare_lora(segments, num_rows)

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """h [T, H] f32 = table[token_ids]."""
        return table[token_ids].float()

    def lora_embed_add(
        self, h: Tensor, token_ids: Tensor, segments: Sequence[tuple[int, int, LoraEmbedding]]
    ) -> None:
        if segments:
            self.raw.lora_embed_add(h, token_ids, segments)

    def rms_norm(self, h: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        """Of the given rows of `h`, or of all."""
        y: Tensor = self.raw.rms_norm(h if rows is None else h[rows], weight, eps)
        return y

    def linear(self, x: Tensor, operand: Any, lora: Any = None) -> Tensor:
        """y = x W^T + b + adapters."""
        y: Tensor = self.raw.linear(x, operand, lora)
        return y

    def linear_add(self, h: Tensor, x: Tensor, operand: Any, lora: Any = None) -> Tensor:
        """h + linear(x); `h` may be changed in place."""
        return self.linear(x, operand, lora).add_(h)

    def linear_gated(self, x: Tensor, operand: Any, lora: Any, act: str) -> Tensor:
        """act(g) * u, where [g | u] = linear(x); act is silu or gelu_tanh."""
        multiply = self.raw.silu_mul if act == "silu" else self.raw.gelu_mul
        y: Tensor = multiply(self.linear(x, operand, lora))
        return y

    def logits(self, x: Tensor, operand: Any, lora: Any = None) -> Tensor:
        """linear(x) in f32."""
        return self.linear(x, operand, lora)

    def rotation(self, tables: tuple[Tensor, Tensor], positions: Tensor) -> Rotation:
        """What `rope_store` needs for rows at these positions: once a step."""
        cos, sin = tables
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)

    def rope_store(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        rotation: Rotation,
        slots: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        """Normalise (with `norms`, of q and k) and rotate q and k, store k and v; gives q for
        `paged_attention`. qkv [T, (heads + 2 KV) * D]."""
        num_kv, dim = k_cache.shape[1:3]
        rows = qkv.view(len(qkv), -1, dim)
        heads = rows.shape[1] - 2 * num_kv
        qk = rows[:, : heads + num_kv]
        if norms is not None:
            normed = self.raw.rms_norm(qk[:, :heads], norms[0], eps)
            qk = torch.cat((normed, self.raw.rms_norm(qk[:, heads:], norms[1], eps)), dim=1)
        qk = self.raw.rope(qk, *rotation)  # [T, heads + KV, D]
        self.raw.store_kv(qk[:, heads:], rows[:, heads + num_kv :], k_cache, v_cache, slots)
        q: Tensor = qk[:, :heads]
        return q

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float
    ) -> Tensor:
        y: Tensor = self.raw.paged_attention(q, k_cache, v_cache, plan, scale)
        return y
