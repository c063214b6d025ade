"""Sequences -> `BatchMeta`: sorts the step's rows into one segment for each adapter, base-only rows
last.

The only place that turns positions and blocks into tensors. Invariant: rows of one sequence stay
together and in order. A step with the same mixture of adapters as the last one reuses its prepared
operands.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from types import ModuleType

import torch

from loriner.adapters.pool import Pool
from loriner.core import Sequence
from loriner.engine.scheduler import Run
from loriner.kernels.operands import AttentionPlan
from loriner.model.batch_meta import BatchMeta, LoraBatch


@dataclass(frozen=True, slots=True)
class Batch:
    """A step ready to run, and whose logits come out, in order."""

    meta: BatchMeta
    sampled: tuple[Sequence, ...]


class BatchBuilder:
    """Builds each step's batch; remembers the last mixture."""

    def __init__(self, pool: Pool, ops: ModuleType, block_size: int) -> None:
        self._pool, self._ops, self._block = pool, ops, block_size
        self._last: dict[str, tuple[object, LoraBatch | None]] = {}

    def build(self, runs: Seq[Run]) -> Batch:
        runs = sorted(runs, key=lambda r: (r.sequence.generation is None, r.sequence.generation))
        sampled = [run for run in runs if run.samples]
        ends = torch.tensor([run.count for run in runs]).cumsum(0)
        sample_rows = torch.tensor(
            [end - 1 for run, end in zip(runs, ends.tolist(), strict=True) if run.samples],
            dtype=torch.int64,
        )
        positions, tokens, slots = self._rows(runs)
        meta = BatchMeta(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            attention=self._attention(runs),
            lora=self._lora("rows", runs, [run.count for run in runs]),
            sample_rows=sample_rows,
            sample_lora=self._lora("sampled", sampled, [1] * len(sampled)),
        )
        return Batch(meta, tuple(run.sequence for run in sampled))

    def _rows(self, runs: Seq[Run]) -> tuple[list[int], list[int], list[int]]:
        positions: list[int] = []
        tokens: list[int] = []
        slots: list[int] = []
        for run in runs:
            sequence, block = run.sequence, self._block
            span = range(run.start, run.start + run.count)
            positions += span
            tokens += sequence.token_ids[run.start : run.start + run.count]
            slots += [sequence.blocks[p // block] * block + p % block for p in span]
        return positions, tokens, slots

    def _attention(self, runs: Seq[Run]) -> AttentionPlan:
        """Block tables as wide as the longest context of the step."""
        spans: list[tuple[int, int]] = []
        tables: list[list[int]] = []
        sequence: list[int] = []
        context: list[int] = []
        width = max(-(-(run.start + run.count) // self._block) for run in runs)
        for i, run in enumerate(runs):
            row = len(sequence)
            spans.append((row, row + run.count))
            sequence += [i] * run.count
            context += range(run.start + 1, run.start + run.count + 1)
            blocks = run.sequence.blocks[:width]
            tables.append(blocks + [0] * (width - len(blocks)))
        return AttentionPlan(
            spans=tuple(spans),
            blocks=torch.tensor(tables, dtype=torch.int32),
            sequence=torch.tensor(sequence, dtype=torch.int32),
            context=torch.tensor(context, dtype=torch.int32),
        )

    def _lora(self, which: str, runs: Seq[Run], counts: Seq[int]) -> LoraBatch | None:
        segments: list[tuple[str, int, int]] = []
        row = 0
        for run, count in zip(runs, counts, strict=True):
            generation = run.sequence.generation
            if generation is not None:
                if segments and segments[-1][0] == generation:
                    segments[-1] = (generation, segments[-1][1], row + count)
                else:
                    segments.append((generation, row, row + count))
            row += count
        return self._reuse(which, segments, row)

    def _reuse(
        self, which: str, segments: list[tuple[str, int, int]], num_rows: int
    ) -> LoraBatch | None:
        weights = [self._pool.weights(generation) for generation, _, _ in segments]
        key = (segments, num_rows, [id(w) for w in weights])
        last = self._last.get(which)
        if last is not None and last[0] == key:
            return last[1]
        spans = [(s, e, w) for (_, s, e), w in zip(segments, weights, strict=True)]
        made = LoraBatch(spans, num_rows, self._ops) if segments else None
        self._last[which] = (key, made)
        return made
