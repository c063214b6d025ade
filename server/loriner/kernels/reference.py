"""Every kernel in plain torch: the specification, the oracle of the tests, and what `cpu.py` speeds
up.

Letters: T rows of the step, H hidden, N outputs, K inputs, R rank, D head dim, V vocabulary.
Everything is computed in the dtype of its inputs; no function keeps state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loriner.kernels.operands import AttentionPlan, LoraEmbedding, Nf4, Segment


class Dense(NamedTuple):
    """A weight ready for `linear`."""

    weight: Tensor  # [N, K] f32
    bias: Tensor | None  # [N] f32


def start(num_threads: int) -> str:
    """Get ready to compute on `num_threads` threads (0: all cores); says what will compute."""
    if num_threads:
        torch.set_num_threads(num_threads)
    return f"torch, {torch.get_num_threads()} threads"


def dequantize_nf4(packed: Tensor, absmax: Tensor, code: Tensor, shape: tuple[int, int]) -> Tensor:
    """Semantics: w[i] = code[nibble(i)] * absmax[i // block], block = N*K / len(absmax).

    packed [N*K/2] u8, high nibble first; absmax [N*K/block] f32; code [16] f32. Returns [N, K] f32.
    Source: bitsandbytes' NF4 layout (QLoRA, arXiv 2305.14314, appendix E).
    """
    pairs = torch.cartesian_prod(code, code)  # [256, 2]: byte -> its two values
    values = pairs[packed.view(-1).to(torch.int64)].view(absmax.numel(), -1)
    return (values * absmax.view(-1, 1)).view(shape)


def dequantized(weight: Nf4) -> Tensor:
    """[N, K] f32."""
    return dequantize_nf4(weight.packed, weight.expanded(), weight.code, weight.shape)


def prepare_nf4(
    packed: Tensor, absmax: Tensor, code: Tensor, shape: tuple[int, int], bias: Tensor | None
) -> Dense:
    """Make an NF4 weight (see `dequantize_nf4`) ready for `linear`; here, a dense copy."""
    return prepare_dense(dequantize_nf4(packed, absmax, code, shape), bias)


def prepare_dense(weight: Tensor, bias: Tensor | None) -> Dense:
    """Make a weight [N, K] that is stored dense ready for `linear`."""
    return Dense(weight.float().contiguous(), None if bias is None else bias.float())


def nbytes(operand: Dense) -> int:
    """Bytes that `operand` keeps resident."""
    return operand.weight.nbytes


def prepare_lora(segments: Sequence[Segment], num_rows: int) -> Sequence[Segment]:
    """Make the segments of one fused linear ready for `linear`."""
    return segments


def linear(x: Tensor, operand: Dense, lora: Sequence[Segment] | None = None) -> Tensor:
    """Semantics: y = x @ W^T + b, and for each segment and part of `lora`
    y[s:e, o:o+n] += scale * (x[s:e] @ A[r0:r1]^T) @ B + bias.

    x [T, K] f32, contiguous; `lora` from `prepare_lora`. Returns [T, N] f32. Rows in no segment
    (base only) are as without `lora`.
    """
    y = F.linear(x, operand.weight, operand.bias)
    for start, end, group in lora or ():
        z = x[start:end] @ group.a.float().t()  # [rows, sum of R]
        for offset, r0, r1, b, scale, bias in group.parts:
            out = y[start:end, offset : offset + b.shape[1]]
            out += scale * z[:, r0:r1] @ b.float()
            if bias is not None:
                out += bias
    return y


def lora_embed_add(
    h: Tensor, token_ids: Tensor, segments: Sequence[tuple[int, int, LoraEmbedding]]
) -> None:
    """Semantics: h[s:e] += A[token_ids[s:e]] @ B.  h [T, H] in place; token_ids [T] int64."""
    for start, end, embedding in segments:
        h[start:end] += F.embedding(token_ids[start:end], embedding.a) @ embedding.b


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Semantics: y = x / sqrt(mean(x^2) + eps) * w over the last axis.  (arXiv 1910.07467, eq.
    4)"""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Semantics: rotate pairs (i, i + D/2) of each head by the row's angle (arXiv 2104.09864, eq.
    34).

    x [T, heads, D]; cos, sin [T, 1, D], where sin's first half is already negated.
    """
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin


def silu_mul(gate_up: Tensor) -> Tensor:
    """Semantics: y = silu(g) * u, where [g | u] = gate_up [T, 2I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_mul(gate_up: Tensor) -> Tensor:
    """Semantics: y = gelu_tanh(g) * u, where [g | u] = gate_up [T, 2I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Semantics: slot s = block * size + i holds the key and value of its row t: k_cache[block, :,
    :, i] = k[t], v_cache[block, :, i] = v[t].

    k, v [T, KV, D]; slots [T] int64; k_cache [blocks, KV, D, size], v_cache [blocks, KV, size, D],
    both changed in place.
    """
    size = v_cache.shape[2]
    block, position = slots // size, slots % size
    k_cache[block, :, :, position] = k
    v_cache[block, :, position] = v


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """Semantics: y[t] = softmax(scale * q[t] K^T) V over the first context[t] keys of its sequence
    (arXiv 1706.03762, eq. 1).

    q [T, heads, D]; caches as in `store_kv`; heads is a multiple of KV. Returns [T, heads * D].
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    num_kv, size, dim = v_cache.shape[1:]
    for i, (start, end) in enumerate(plan.spans):
        context = int(plan.context[end - 1])
        blocks = plan.blocks[i, : -(-context // size)].to(torch.int64)
        k = k_cache[blocks].permute(1, 2, 0, 3).reshape(num_kv, 1, dim, -1)[..., :context]
        v = v_cache[blocks].transpose(0, 1).reshape(num_kv, 1, -1, dim)[:, :, :context]
        queries = q[start:end].transpose(0, 1).reshape(num_kv, -1, end - start, dim)
        scores = scale * queries @ k  # [KV, group, rows, context]
        hidden = torch.arange(context) >= plan.context[start:end, None]  # [rows, context]
        scores.masked_fill_(hidden, -torch.inf)
        out[start:end] = (scores.softmax(-1) @ v).flatten(0, 1).transpose(0, 1)
    return out.flatten(1)
