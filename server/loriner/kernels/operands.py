"""What kernels are given besides activations: plain tensors under names, with no behaviour.

Made once (at load, or when a step's mixture of adapters changes), read by every launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NESTED_BLOCK = 256  # scales that share one nested scale
# Fused linears, and what is adapted as they are, in the order of a table of seats: of each layer,
# then those behind all layers.
LAYER_GROUPS = ("qkv", "o", "gate_up", "down")
EMBEDDING = "embed"  # of tokens
LAST_GROUPS = ("lm_head", EMBEDDING)


@dataclass(frozen=True, slots=True)
class NestedScales:
    """Scales quantised to 8 bits: scale[b] = code[index[b]] * absmax[b // 256] + offset."""

    index: Tensor  # [blocks] u8
    absmax: Tensor  # [ceil(blocks / 256)] f32
    code: Tensor  # [256] f32
    offset: float  # an f32 value

    def expand(self) -> Tensor:
        """The scales [blocks] f32, rounded as bitsandbytes rounds: product, then sum."""
        count = self.index.numel()
        values = self.code.to(self.index.device)[self.index.long()]
        scaled = values * self.absmax.repeat_interleave(NESTED_BLOCK)[:count]
        return scaled + torch.tensor(self.offset, dtype=torch.float32, device=scaled.device)


class Nf4(NamedTuple):
    """One NF4 weight as it is stored; element n*K + k is in block (n*K + k) // 64."""

    packed: Tensor  # [N*K/2] u8, element 2i in the high nibble of byte i
    absmax: Tensor | NestedScales  # [N*K/64] f32
    code: Tensor  # [16] f32
    shape: tuple[int, int]  # (N, K)

    @property
    def nested(self) -> NestedScales | None:
        return self.absmax if isinstance(self.absmax, NestedScales) else None

    def expanded(self) -> Tensor:
        """The scales [N*K/64] f32."""
        return self.absmax.expand() if isinstance(self.absmax, NestedScales) else self.absmax


class LoraPart(NamedTuple):
    """One adapter's B for one slice of a fused linear, e.g. `k` of q|k|v."""

    offset: int  # first output column of the slice
    rank_start: int  # rows [rank_start, rank_end) of the group's A belong to this slice
    rank_end: int
    b: Tensor  # [R, n]: B transposed, contiguous, in the dtype of the group's A
    scale: float = 1.0  # of (x A^T) B
    bias: Tensor | None = None  # [n] f32, its scaling folded in


class LoraGroup(NamedTuple):
    """One adapter's weights for one fused linear."""

    a: Tensor  # [sum of R, K], contiguous, f32 or bf16
    parts: tuple[LoraPart, ...]


class LoraEmbedding(NamedTuple):
    """One adapter's weights for the token embedding."""

    a: Tensor  # [vocab, R]: A transposed, contiguous
    b: Tensor  # [R, H], scaling folded in


class Segment(NamedTuple):
    """Rows [start, end) of the step, and the adapter weights they use for one fused linear."""

    start: int
    end: int
    group: LoraGroup


class AttentionPlan(NamedTuple):
    """Which keys each row sees. Rows of one sequence are neighbours, in order of position."""

    spans: tuple[tuple[int, int], ...]  # rows [start, end) of each sequence
    blocks: Tensor  # [sequences, width] int32: KV blocks, padded with 0, never read beyond context
    sequence: Tensor  # [T] int32: each row's sequence
    context: Tensor  # [T] int32: keys that the row sees, its own included
