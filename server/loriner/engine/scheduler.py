"""Who runs in this step: token budget, KV blocks, seats, order of arrival, preemption.

Knows sequences and counts, no tensors. Decoding sequences go first, then prefills already begun,
then waiting ones in order of arrival. A sequence whose adapter is loading or has no seat is passed
over, so it never blocks others; once it has waited `DRAIN_S` for a seat, no later arrival takes a
seat before it, so it never starves. Invariant: a running sequence holds blocks for what it has
computed, and its adapter's pin.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from loriner.adapters.registry import Readiness, Registry
from loriner.core import Sequence
from loriner.engine.kv_cache import BlockManager

DRAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Run:
    """`count` tokens of `sequence` from `start` on are rows of this step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the last row is the newest token, so that its logits choose the next."""
        return self.start + self.count == len(self.sequence.token_ids)


class Scheduler:
    """Waiting and running sequences, and the decision of each step."""

    def __init__(
        self,
        blocks: BlockManager,
        registry: Registry,
        *,
        max_sequences: int,
        max_step_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.blocks, self.registry = blocks, registry
        self.max_sequences, self.max_step_tokens = max_sequences, max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.failed: list[
            tuple[Sequence, Exception]
        ] = []  # taken by the engine after each schedule
        self.num_preemptions = 0
        self._clock = clock
        self._leaders: dict[str, Sequence] = {}  # first choice of each request
        registry.is_wanted = self._is_wanted

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        if sequence.index == 0:
            self._leaders[sequence.request.request_id] = sequence
        if sequence.generation is not None:
            sequence.cold_start = self.registry.tier(sequence.generation) == "disk"
            self.registry.prefetch(sequence.generation)

    def schedule(self) -> list[Run]:
        """Choose this step's rows; sequences that cannot run are in `failed`."""
        runs: list[Run] = []
        budget = self._continue_running(runs)
        self._admit(runs, budget)
        return runs

    def finish(self, sequence: Sequence) -> None:
        """Forget `sequence`, wherever it is; its blocks and pin are free at once."""
        if sequence.index == 0:
            self._leaders.pop(sequence.request.request_id, None)
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def _continue_running(self, runs: list[Run]) -> int:
        """Schedule running sequences, preempting the latest admitted when blocks run out."""
        budget = self.max_step_tokens
        order = sorted(self.running, key=lambda s: s.num_uncomputed > 1)
        for sequence in order:
            if sequence not in self.running or budget == 0:
                continue
            count = min(sequence.num_uncomputed, budget)
            if not self._make_room(sequence, sequence.num_computed + count, runs):
                continue
            self.blocks.allocate(sequence, sequence.num_computed + count)
            runs.append(Run(sequence, sequence.num_computed, count))
            budget -= count
        return budget

    def _make_room(self, sequence: Sequence, num_tokens: int, runs: list[Run]) -> bool:
        while not self.blocks.can_allocate(sequence, num_tokens):
            chosen = {run.sequence for run in runs}
            victim = next(s for s in reversed(self.running) if s not in chosen)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _admit(self, runs: list[Run], budget: int) -> None:
        draining = False
        failed: set[str | None] = set()
        for sequence in list(self.waiting):
            if budget == 0 or len(self.running) >= self.max_sequences:
                return
            if sequence.generation in failed:
                continue
            if (draining and self._takes_a_seat(sequence)) or self._waits_for_sibling(sequence):
                continue
            readiness = self._readiness(sequence)
            if readiness is Readiness.FAILED:
                failed.add(sequence.generation)
                self._fail(sequence)
            if readiness is Readiness.NO_SEAT:
                draining |= self._clock() - sequence.request.arrival_s > DRAIN_S
            if readiness is not Readiness.SEATED:
                continue
            if not self.blocks.can_allocate(sequence, len(sequence.token_ids)):
                return  # order of arrival: a long prompt is not overtaken for ever
            budget -= self._start(sequence, runs, budget)

    def _takes_a_seat(self, sequence: Sequence) -> bool:
        """Whether `sequence` would prolong the use of a seat that a waiting one needs."""
        generation, pool = sequence.generation, self.registry.pool
        return generation is not None and not (generation in pool.kept and generation in pool)

    def _readiness(self, sequence: Sequence) -> Readiness:
        if sequence.generation is None:
            return Readiness.SEATED
        return self.registry.want(sequence.generation)

    def _start(self, sequence: Sequence, runs: list[Run], budget: int) -> int:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self.blocks.allocate(sequence, len(sequence.token_ids))
        if sequence.generation is not None:
            self.registry.pool.acquire(sequence.generation)
            sequence.seated = True
        count = min(sequence.num_uncomputed, budget)
        runs.append(Run(sequence, sequence.num_computed, count))
        return count

    def _waits_for_sibling(self, sequence: Sequence) -> bool:
        """Choices after the first wait until the first has put their common prompt in the cache."""
        if sequence.index == 0 or not self.blocks.prefix_cache or sequence.num_output:
            return False
        leader = self._leaders.get(sequence.request.request_id)
        return leader is not None and leader.num_computed < leader.num_prompt

    def _is_wanted(self, generation: str) -> bool:
        return any(s.generation == generation for s in self.waiting)

    def _fail(self, sequence: Sequence) -> None:
        """The adapter of `sequence` could not be loaded: all that wait for it hear why."""
        assert sequence.generation is not None
        failure = self.registry.take_failure(sequence.generation)
        for other in [s for s in self.waiting if s.generation == sequence.generation]:
            self.finish(other)
            self.failed.append((other, failure))

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.free(sequence)
        if sequence.seated:
            assert sequence.generation is not None
            self.registry.pool.release(sequence.generation)
            sequence.seated = False
