"""Runs -> `StepInput`: sorts the step's rows into one span for each adapter, base-only rows last.

The only place that turns positions and blocks into arrays; knows no tensors and no seats.
Invariant: rows of one sequence stay together and in order.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from loriner.core import UNKNOWN, Sequence
from loriner.engine.kv_cache import BlockManager
from loriner.engine.runs import Run
from loriner.engine.step_input import Draw, Ints, Reading, Span, StepInput


@dataclass(frozen=True, slots=True)
class Batch:
    """A step ready to run, and whose tokens and prompts come out, in order."""

    step: StepInput
    sampled: tuple[Run, ...]
    read: tuple[Run, ...]


class BatchBuilder:
    """Builds each step's batch from the sequences and the block manager's table."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks

    def build(self, runs: Seq[Run]) -> Batch:
        runs = _by_generation(runs)
        sequences = [run.sequence for run in runs]
        starts = np.array([run.start for run in runs], dtype=np.int32)
        counts = np.array([run.num_rows for run in runs], dtype=np.int32)
        q_start = np.zeros(len(runs) + 1, dtype=np.int32)
        counts.cumsum(out=q_start[1:])
        which = np.arange(len(runs), dtype=np.int32).repeat(counts)  # [T]: each row's sequence
        positions = np.arange(q_start[-1], dtype=np.int32) + (starts - q_start[:-1])[which]
        context = starts + counts
        table, slots = self._table(sequences, which, positions, context)
        token_ids, token_source = _tokens(runs, which)
        sampled = [run for run in runs if run.samples]
        read = [(i, run) for i, run in enumerate(runs) if run.sequence.reads_prompt]
        read = [(i, run) for i, run in read if run.start < run.sequence.num_prompt]
        chosen = np.array([run.samples for run in runs], dtype=bool)
        spans = _spans(sequences, q_start.tolist())
        if len(which) == len(runs) == len(sampled):  # one row each, all sampled
            sample_spans = spans
        else:
            sample_spans = _spans([run.sequence for run in sampled], range(len(sampled) + 1))
        step = StepInput(
            token_ids=token_ids,
            token_source=token_source,
            positions=positions,
            slots=slots,
            q_start=q_start,
            context=context,
            block_table=table,
            spans=spans,
            sample_rows=q_start[1:][chosen] - 1,
            sample_spans=sample_spans,
            draws=tuple([Draw.of(run.sequence, run.end) for run in sampled]),
            readings=tuple([_reading(run, int(q_start[i])) for i, run in read]),
        )
        return Batch(step, tuple(sampled), tuple([run for _, run in read]))

    def _table(
        self, sequences: Seq[Sequence], which: Ints, positions: Ints, context: Ints
    ) -> tuple[Ints, Ints]:
        """Each sequence's blocks, as wide as the longest context, and each row's slot."""
        size = self._blocks.block_size
        rows = np.array([sequence.row for sequence in sequences], dtype=np.int32)
        width = -(-int(context.max()) // size)
        table = self._blocks.table[rows, :width]
        block, offset = np.divmod(positions, np.int32(size))
        return table, table[which, block] * np.int32(size) + offset


def _by_generation(runs: Seq[Run]) -> Seq[Run]:
    named = [run for run in runs if run.sequence.generation is not None]
    if not named:
        return runs
    named.sort(key=_generation)
    return named + [run for run in runs if run.sequence.generation is None]


def _generation(run: Run) -> str:
    return run.sequence.generation or ""


def _tokens(runs: Seq[Run], which: Ints) -> tuple[Ints, Ints]:
    """Token ids, and for those that only the GPU has, where it finds them."""
    if len(which) == len(runs):
        ids = [run.sequence.token_ids[run.start] for run in runs]
    else:
        ids = []
        for run in runs:
            ids += run.sequence.token_ids[run.start : run.end]
    token_ids = np.array(ids, dtype=np.int32)
    token_source = np.full(len(ids), -1, dtype=np.int32)
    unknown = np.flatnonzero(token_ids == UNKNOWN)
    if len(unknown):
        token_source[unknown] = [runs[i].sequence.source for i in which[unknown].tolist()]
        token_ids[unknown] = 0
    return token_ids, token_source


def _reading(run: Run, first_row: int) -> Reading:
    """The last token of a prompt is followed by none of it."""
    sequence = run.sequence
    num_top = sequence.request.sampling.prompt_logprobs
    if sequence.request.embeds or num_top is None:
        return Reading(first_row, first_row + run.num_rows, sequence.generation)
    following = sequence.token_ids[run.start + 1 : min(run.end + 1, sequence.num_prompt)]
    targets = np.array(following, dtype=np.int32)
    return Reading(first_row, first_row + len(targets), sequence.generation, targets, num_top)


def _spans(sequences: Seq[Sequence], starts: Seq[int]) -> tuple[Span, ...]:
    """One span for each generation; sequence i has rows [starts[i], starts[i + 1])."""
    spans = []
    begin, current = 0, None
    for i, sequence in enumerate(sequences):
        if sequence.generation != current:
            if current is not None:
                spans.append(Span(starts[begin], starts[i], current))
            begin, current = i, sequence.generation
            if current is None:
                break
    if current is not None:
        spans.append(Span(starts[begin], starts[len(sequences)], current))
    return tuple(spans)
