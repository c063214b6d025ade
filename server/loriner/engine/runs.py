"""What a step is made of while it is decided: runs of rows, and what is settled for its length.

Knows sequences, no blocks and no tensors. Invariant: `budget` is what the runs leave of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from loriner.core import Sequence

# A prompt's last rows run together: on a GPU a single row goes through decode's attention, which
# adds in another order than prefill's, and a token might depend on how the prompt was cut.
LAST_ROWS = 2


class Run(NamedTuple):
    """`num_rows` tokens of `sequence` from `start` on are rows of this step."""

    sequence: Sequence
    start: int
    num_rows: int
    samples: bool  # the last row is the newest token, so that its logits choose the next
    num_preemptions: int  # of the sequence, so far: when it has grown, the blocks are gone

    @classmethod
    def of(cls, sequence: Sequence, num_rows: int) -> Run:
        """The next `num_rows` tokens."""
        start = sequence.num_computed
        is_last = start + num_rows == len(sequence.token_ids)
        samples = is_last and sequence.generates
        return cls(sequence, start, num_rows, samples, sequence.num_preemptions)

    @classmethod
    def within(cls, sequence: Sequence, budget: int) -> Run:
        """As many of its tokens as `budget` rows hold, but for a prompt's `LAST_ROWS`."""
        left = sequence.num_uncomputed
        count = min(left, budget)
        if sequence.num_output == 0 and 0 < left - count < LAST_ROWS < left:
            count = max(1, left - LAST_ROWS)
        return cls.of(sequence, count)

    @property
    def end(self) -> int:
        return self.start + self.num_rows

    @property
    def holds(self) -> bool:
        """Whether the sequence still has the blocks that these rows were written to."""
        sequence = self.sequence
        return not sequence.done and sequence.num_preemptions == self.num_preemptions


@dataclass(slots=True)
class Step:
    """What has been decided of a step so far."""

    budget: int  # rows that are left
    runs: dict[Sequence, Run] = field(default_factory=dict)
    gave_way: set[Sequence] = field(default_factory=set)
    passed: set[str | None] = field(default_factory=set)  # generations that nobody can have now
    passed_tenants: set[str] = field(default_factory=set)  # whose next cannot be admitted now
    refused_seats: set[str] = field(default_factory=set)  # tenants that may not claim any
    draining: bool = False
    full: bool = False  # one whose turn it is waits for blocks: nobody else may take them

    def add(self, run: Run) -> None:
        self.runs[run.sequence] = run
        self.budget -= run.num_rows

    def drop(self, sequence: Sequence) -> None:
        self.gave_way.add(sequence)
        run = self.runs.pop(sequence, None)
        self.budget += run.num_rows if run else 0
