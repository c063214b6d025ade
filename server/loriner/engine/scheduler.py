"""Who runs in this step: token budget, KV blocks, seats, turns of tenants, preemption.

Knows sequences and counts, no tensors. Decoding sequences go first, then prefills already begun,
then waiting ones by their tenants' turns, in order of arrival within one. A sequence whose adapter
is loading or has no seat is passed over, so it never blocks others; once it has waited `DRAIN_S`
for a seat, nobody whose turn is later takes a seat before it, so it never starves. A sequence may
be scheduled while the step before still runs and its newest token is not known; counts tell enough.
Invariant: a running sequence holds blocks for what it has computed, and its adapter's pin; none is
given more tokens than its limit.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from loriner.adapters.registry import Readiness, Registry
from loriner.core import Sequence
from loriner.engine.fairness import Turns
from loriner.engine.kv_cache import BlockManager

DRAIN_S = 0.5


class Run(NamedTuple):
    """`num_rows` tokens of `sequence` from `start` on are rows of this step."""

    sequence: Sequence
    start: int
    num_rows: int
    samples: bool  # the last row is the newest token, and its logits choose the next
    num_preemptions: int  # of the sequence, so far: when it has grown, the blocks are gone

    @classmethod
    def of(cls, sequence: Sequence, num_rows: int) -> Run:
        """The next `num_rows` tokens."""
        start = sequence.num_computed
        is_last = start + num_rows == len(sequence.token_ids)
        samples = is_last and not sequence.request.embeds
        return cls(sequence, start, num_rows, samples, sequence.num_preemptions)

    @property
    def end(self) -> int:
        return self.start + self.num_rows

    @property
    def holds(self) -> bool:
        """Whether the sequence still has the blocks that these rows were written to."""
        sequence = self.sequence
        return not sequence.done and sequence.num_preemptions == self.num_preemptions


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
        load_of: Callable[[str], float] = lambda generation: 1.0,
    ) -> None:
        self.blocks, self.registry = blocks, registry
        self.max_sequences, self.max_step_tokens = max_sequences, max_step_tokens
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()  # in order of their turn
        self.running: dict[Sequence, None] = {}  # in order of admission
        self._wanted: Counter[str | None] = Counter()  # generations of the waiting ones
        self.failed: list[
            tuple[Sequence, Exception]
        ] = []  # taken by the engine after each schedule
        self.num_preemptions = 0
        self._clock = clock
        self.turns = Turns(load_of)
        self._leaders: dict[str, Sequence] = {}  # first choice of each request
        registry.is_wanted = self._is_wanted

    def add(self, sequence: Sequence) -> None:
        self._wait(sequence)
        if sequence.index == 0:
            self._leaders[sequence.request.request_id] = sequence
        if sequence.generation is not None:
            sequence.cold_start = self.registry.tier(sequence.generation) == "disk"
            self.registry.prefetch(sequence.generation)

    def schedule(self) -> list[Run]:
        """Choose this step's rows; sequences that cannot run are in `failed`."""
        runs: list[Run] = []
        budget = self._continue_running(runs)
        if budget and self.waiting and len(self.running) < self.max_sequences:
            self._admit(runs, budget)
        return runs

    def finish(self, sequence: Sequence) -> None:
        """Forget `sequence`, wherever it is; its blocks and pin are free at once."""
        if sequence.index == 0:
            self._leaders.pop(sequence.request.request_id, None)
        if sequence in self.running:
            del self.running[sequence]
            self._release(sequence)
            self.turns.settle(sequence)
        elif sequence in self.waiting:
            self._wait_no_more(sequence)

    def _continue_running(self, runs: list[Run]) -> int:
        """Schedule running sequences, preempting the latest admitted when blocks run out."""
        budget = self.max_step_tokens
        block_size = self.blocks.block_size
        for sequence in self._ready():
            if budget == 0:
                break
            start, wanted = sequence.num_computed, len(sequence.token_ids)
            end = min(wanted, start + budget)
            if end > len(sequence.blocks) * block_size:
                if sequence not in self.running or not self._make_room(sequence, end, runs):
                    continue
                self.blocks.allocate(sequence, end)
            samples = end == wanted and not sequence.request.embeds
            runs.append(Run(sequence, start, end - start, samples, sequence.num_preemptions))
            budget -= end - start
        return budget

    def _ready(self) -> list[Sequence]:
        """Those that can go on, decoding ones first. Not one whose last token or whose embedding
        is on its way, nor one whose newest token the host must see before the next."""
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            num_tokens = len(sequence.token_ids)
            if sequence.num_known < num_tokens and (
                num_tokens >= sequence.limit or sequence.needs_host
            ):
                continue
            left = num_tokens - sequence.num_computed
            if left:
                (decoding if left == 1 else prefilling).append(sequence)
        return decoding + prefilling

    def _make_room(self, sequence: Sequence, num_tokens: int, runs: list[Run]) -> bool:
        if self.blocks.can_allocate(sequence, num_tokens):
            return True
        chosen = {run.sequence for run in runs}
        while not self.blocks.can_allocate(sequence, num_tokens):
            victim = next(s for s in reversed(self.running) if s not in chosen)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _admit(self, runs: list[Run], budget: int) -> None:
        draining = False
        passed: set[str | None] = set()  # generations that no sequence of this step can have
        for sequence in self.turns.order(self.waiting, self.running):
            if budget == 0 or len(self.running) >= self.max_sequences:
                return
            if sequence.generation in passed:
                continue
            if not sequence.all_known:
                return  # preempted while a step chose its next token, which comes before the next
            if (draining and self._takes_a_seat(sequence)) or self._waits_for_sibling(sequence):
                continue
            readiness = self._readiness(sequence)
            if readiness is Readiness.FAILED:
                self._fail(sequence)
            if readiness is Readiness.NO_SEAT:
                draining |= self._clock() - sequence.request.arrival_s > DRAIN_S
            if readiness is not Readiness.SEATED:
                passed.add(sequence.generation)
                continue
            if not self.blocks.can_allocate(sequence, len(sequence.token_ids)):
                return  # it is its turn: a long prompt is not overtaken for ever
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
        self._wait_no_more(sequence)
        self.running[sequence] = None
        self.blocks.allocate(sequence, len(sequence.token_ids))
        self.turns.begin(sequence)
        if sequence.generation is not None:
            self.registry.pool.acquire(sequence.generation)
            sequence.seated = True
        count = min(sequence.num_uncomputed, budget)
        runs.append(Run.of(sequence, count))
        return count

    def _waits_for_sibling(self, sequence: Sequence) -> bool:
        """Choices after the first wait until the first has put their common prompt in the cache,
        and has read it."""
        leader = self._leaders.get(sequence.request.request_id)
        if sequence.index == 0 or leader is None or sequence.num_output:
            return False
        if leader.reads_prompt:
            return True
        return self.blocks.prefix_cache and leader.num_settled < leader.num_prompt

    def _is_wanted(self, generation: str) -> bool:
        return self._wanted[generation] > 0

    def _fail(self, sequence: Sequence) -> None:
        """The adapter of `sequence` could not be loaded: all that wait for it hear why."""
        assert sequence.generation is not None
        failure = self.registry.take_failure(sequence.generation)
        for other in [s for s in self.waiting if s.generation == sequence.generation]:
            self.finish(other)
            self.failed.append((other, failure))

    def _preempt(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self._release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(sequence)
        self.waiting.move_to_end(sequence, last=False)

    def _wait(self, sequence: Sequence) -> None:
        self.waiting[sequence] = None
        self.turns.join(sequence)
        self._wanted[sequence.generation] += 1

    def _wait_no_more(self, sequence: Sequence) -> None:
        del self.waiting[sequence]
        self.turns.leave(sequence)
        self._wanted[sequence.generation] -= 1
        if not self._wanted[sequence.generation]:
            del self._wanted[sequence.generation]

    def _release(self, sequence: Sequence) -> None:
        self.blocks.free(sequence)
        if sequence.seated:
            assert sequence.generation is not None
            self.registry.pool.release(sequence.generation)
            sequence.seated = False
