"""Who runs in this step: token budget, KV blocks, seats, turns of tenants, preemption.

Knows sequences and counts, no tensors. Of one tenant decoding sequences go first, then prefills
already begun, then waiting ones; of several each gets rows by its turn, and one that holds less
than its share takes places, blocks and seats of others (`preemption.py`). A sequence whose adapter
is loading or has no seat is passed over, so it never blocks others; once it has waited `DRAIN_S`
for a seat, nobody whose turn is later takes a seat before it, so it never starves. A sequence may
be scheduled while the step before still runs and its newest token is not known; counts tell enough.
Invariant: a running sequence holds blocks for what it has computed, and its adapter's pin; none is
given more tokens than its limit.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from itertools import chain

from loriner.adapters.registry import Readiness, Registry
from loriner.core import Sequence
from loriner.engine import preemption
from loriner.engine.fairness import Turns
from loriner.engine.kv_cache import BlockManager
from loriner.engine.runs import Run, Step

DRAIN_S = 0.5
SHARED_S = 10.0  # after several tenants asked at once, steps stay short for so long


class Scheduler:
    """Waiting and running sequences, and the decision of each step."""

    def __init__(
        self,
        blocks: BlockManager,
        registry: Registry,
        *,
        max_sequences: int,
        max_step_tokens: int,
        shared_step_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        load_of: Callable[[str], float] = lambda generation: 1.0,
    ) -> None:
        self.blocks, self.registry = blocks, registry
        self.max_sequences, self.max_step_tokens = max_sequences, max_step_tokens
        self.shared_step_tokens = min(max_step_tokens, shared_step_tokens or max_step_tokens)
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()  # in order of their turn
        self.running: dict[Sequence, None] = {}  # in order of admission
        self._wanted: Counter[str | None] = Counter()  # generations of the waiting ones
        self.failed: list[tuple[Sequence, Exception]] = []  # the engine takes them after each step
        self.num_preemptions = 0
        self._clock = clock
        self.turns = Turns(load_of)
        self._shared_until = -math.inf  # by the clock
        self._ran_at: dict[Sequence, int] = {}  # order of rows, where steps are short
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
        if self.turns.contested:
            self.turns.settle()
            self._shared_until = self._clock() + SHARED_S
        is_shared = self._clock() <= self._shared_until  # also in the pauses of one of them
        step = Step(self.shared_step_tokens if is_shared else self.max_step_tokens)
        decoding, begun = self._ready()
        if self._grow(decoding):
            decoding, begun = self._ready()
        if self._ran_at:
            decoding.sort(key=lambda one: self._ran_at.get(one, 0))
        has_place = len(self.running) < self.max_sequences
        waiting = self.waiting if has_place or self.turns.claimable else ()
        if begun or waiting or len(decoding) > step.budget:
            ready = chain(decoding, begun)
            self._fill(step, self.turns.order(ready, list(waiting), step.passed_tenants))
        else:
            self._fill(step, decoding)
        self._note_who_ran(step, decoding)
        return list(step.runs.values())

    def _note_who_ran(self, step: Step, decoding: Iterable[Sequence]) -> None:
        """Where a step is too short for all, who had no row for the longest time is first in the
        next."""
        if step.budget or all(one in step.runs or one in step.gave_way for one in decoding):
            self._ran_at.clear()
            return
        last = max(self._ran_at.values(), default=0)
        self._ran_at = {one: at for one, at in self._ran_at.items() if one in self.running}
        self._ran_at |= {one: at for at, one in enumerate(step.runs, last + 1)}

    def finish(self, sequence: Sequence) -> None:
        """Forget `sequence`, wherever it is; its blocks and pin are free at once."""
        if sequence.index == 0:
            self._leaders.pop(sequence.request.request_id, None)
        if sequence in self.running:
            self._stop(sequence)
        elif sequence in self.waiting:
            self._wait_no_more(sequence)

    def _fill(self, step: Step, order: Iterable[Sequence]) -> None:
        """Give rows to those in `order`, and admit those of them that wait."""
        for sequence in order:
            if sequence in self.running:
                if step.budget:
                    self._run(sequence, step)
            elif sequence in step.gave_way or step.full:
                continue
            elif step.budget or len(self.running) >= self.max_sequences:
                self._admit(sequence, step)
            else:
                return

    def _run(self, sequence: Sequence, step: Step) -> None:
        run = Run.within(sequence, step.budget)
        step.add(run)
        self.turns.charge(sequence, min(run.end, sequence.num_prompt))

    def _ready(self) -> tuple[list[Sequence], list[Sequence]]:
        """Those that can go on: (decoding, prefill begun). Not one whose last token or whose
        embedding is on its way, nor one whose newest token the host must see before the next."""
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
        return decoding, prefilling

    def _grow(self, decoding: Iterable[Sequence]) -> bool:
        """Blocks for the newest token of each; says whether any had to be preempted for them."""
        block_size, num_preemptions = self.blocks.block_size, self.num_preemptions
        for sequence in decoding:
            num_tokens = len(sequence.token_ids)
            if num_tokens <= len(sequence.blocks) * block_size:
                continue
            while sequence in self.running and not self.blocks.can_allocate(sequence, num_tokens):
                self._preempt(preemption.who_grew_most(self.running, self.turns))
            if sequence in self.running:
                self.blocks.allocate(sequence, num_tokens)
        return self.num_preemptions > num_preemptions

    def _admit(self, sequence: Sequence, step: Step) -> None:
        """Let a waiting one run, if it can have all that it needs: a place, its adapter's seat and
        blocks. Else `step` remembers for whom there is none of them now."""
        if sequence.generation in step.passed or self._waits_for_sibling(sequence):
            return
        if step.draining and self._takes_a_seat(sequence):
            return
        # One that is not all known was preempted while a step chose its token: that comes first.
        if not sequence.all_known or self._claim_places(sequence) is None:
            step.passed_tenants.add(sequence.request.salt)
            return
        if not self._seat(sequence, step):
            step.passed.add(sequence.generation)
            return
        victims = self._claim_all(sequence)
        if victims is None:
            step.full = True  # it is its turn: a long prompt is not overtaken for ever
            return
        self._give_way(victims, step)
        self._start(sequence)
        if step.budget:
            self._run(sequence, step)

    def _claim_places(self, sequence: Sequence) -> list[Sequence] | None:
        """Who gives way to `sequence` for its place; None when it has to wait."""
        missing = len(self.running) + 1 - self.max_sequences
        if missing <= 0:
            return []
        place = preemption.of_place
        return preemption.claim(sequence, self.running, self.turns, place, 1, missing)

    def _claim_all(self, sequence: Sequence) -> list[Sequence] | None:
        """Who gives way to `sequence` for its place and its blocks; None when it has to wait."""
        victims, blocks = self._claim_places(sequence) or [], self.blocks
        missing = blocks.num_missing(sequence, len(sequence.token_ids))
        missing -= sum(map(blocks.num_own, victims))
        if missing <= 0:
            return victims
        others = [one for one in self.running if one not in victims]
        wanted = blocks.num_needed(len(sequence.token_ids))
        more = preemption.claim(sequence, others, self.turns, blocks.num_own, wanted, missing)
        return None if more is None else victims + more

    def _give_way(self, victims: Iterable[Sequence], step: Step) -> None:
        for victim in victims:
            step.drop(victim)
            self._preempt(victim)

    def _seat(self, sequence: Sequence, step: Step) -> bool:
        """Whether its adapter has a seat, which others may have to give up for it."""
        readiness = self._readiness(sequence)
        if readiness is Readiness.NO_SEAT and self._claim_seat(sequence, step):
            readiness = self._readiness(sequence)
        if readiness is Readiness.FAILED:
            self._fail(sequence)
        if readiness is Readiness.NO_SEAT:
            step.draining |= self._clock() - sequence.request.arrival_s > DRAIN_S
        return readiness is Readiness.SEATED

    def _claim_seat(self, sequence: Sequence, step: Step) -> bool:
        """Make others give up a seat; says whether they did."""
        tenant = sequence.request.salt
        if tenant in step.refused_seats or not self.turns.contested:
            return False
        if self._claim_all(sequence) is None:
            return False
        kept = self.registry.pool.kept
        users = preemption.claim_seat(sequence, self.running, self.turns, kept)
        self._give_way(users, step)
        if not users:
            step.refused_seats.add(tenant)
        return bool(users)

    def _takes_a_seat(self, sequence: Sequence) -> bool:
        """Whether `sequence` would prolong the use of a seat that a waiting one needs."""
        generation, pool = sequence.generation, self.registry.pool
        return generation is not None and not (generation in pool.kept and generation in pool)

    def _readiness(self, sequence: Sequence) -> Readiness:
        if sequence.generation is None:
            return Readiness.SEATED
        return self.registry.want(sequence.generation)

    def _start(self, sequence: Sequence) -> None:
        self._wait_no_more(sequence)
        self.running[sequence] = None
        self.blocks.allocate(sequence, len(sequence.token_ids))
        self.turns.begin(sequence)
        if sequence.generation is not None:
            self.registry.pool.acquire(sequence.generation)
            sequence.seated = True

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
        self._stop(sequence)
        sequence.num_preemptions += 1
        sequence.num_when_preempted = len(sequence.token_ids)
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

    def _stop(self, sequence: Sequence) -> None:
        """It runs no more: its blocks and its pin are free."""
        del self.running[sequence]
        self.turns.end(sequence)
        self.blocks.free(sequence)
        if sequence.seated:
            assert sequence.generation is not None
            self.registry.pool.release(sequence.generation)
            sequence.seated = False
