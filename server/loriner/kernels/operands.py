"""What kernels are given besides activations: plain tensors under names, with no behaviour.

Made once (at load, or when a step's mixture of adapters changes), read by every launch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
