"""All that one forward pass must know, made by `engine/batch.py` and passed down; never global."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loriner.adapters.pool import SeatWeights
from loriner.kernels.operands import AttentionPlan, LoraEmbedding, Segment


class LoraBatch:
    """The segments of one step. Operands are prepared once for each fused linear and kept: a step
    with the same mixture reuses the whole object."""

    def __init__(
        self, segments: Sequence[tuple[int, int, SeatWeights]], num_rows: int, ops: Any
    ) -> None:
        self._segments = segments
        self._num_rows = num_rows
        self._ops = ops
        self._operands: dict[str, Any] = {}

    def operand(self, group: str) -> Any | None:
        """What `ops.linear` needs for this fused linear; None when no segment targets it."""
        if group not in self._operands:
            segments = [
                Segment(start, end, weights.groups[group])
                for start, end, weights in self._segments
                if group in weights.groups
            ]
            made = self._ops.prepare_lora(segments, self._num_rows) if segments else None
            self._operands[group] = made
        return self._operands[group]

    @property
    def embeddings(self) -> list[tuple[int, int, LoraEmbedding]]:
        return [(s, e, w.embedding) for s, e, w in self._segments if w.embedding is not None]


@dataclass(frozen=True, slots=True)
class BatchMeta:
    """One step: T rows sorted so that each adapter's rows are one segment; base-only rows come
    last."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64: block * block_size + offset in the KV cache
    attention: AttentionPlan
    lora: LoraBatch | None  # None: no row uses an adapter
    sample_rows: Tensor  # [S] int64: rows whose next token is wanted
    sample_lora: LoraBatch | None  # the same segments over the sampled rows, for lm_head
    reader: Callable[[Tensor], None] | None = None  # is shown h [T, H] as the last norm gets it
