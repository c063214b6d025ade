"""Whose turn it is: weighted virtual token counters of tenants (VTC: Sheng et al., OSDI 2024,
arXiv 2401.00588).

A tenant's counter grows with what it is served, over its weight; of the tenants that wait the one
with the smallest is next, within it by priority, then arrival. Knows no blocks and no seats.
Invariant: a tenant that begins to wait is lifted to the smallest counter of those that wait, so
that idling earns nothing.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator

from loriner.core import Sequence

PROMPT_COST = 1.0  # of a computed prompt token
OUTPUT_COST = 2.0  # of an output token


class Turns:
    """`load_of`: how many times a token's cost one of this generation has."""

    def __init__(self, load_of: Callable[[str], float]) -> None:
        self._load_of = load_of
        self._served: defaultdict[str, float] = defaultdict(float)
        self._waiting: Counter[str] = Counter()
        self._num_prioritised = 0  # of those that wait
        self._floor = 0.0  # counter of the last tenant that stopped waiting

    def served(self, tenant: str) -> float:
        return self._served[tenant]

    def join(self, sequence: Sequence) -> None:
        """It begins to wait."""
        tenant = sequence.request.salt
        if not self._waiting[tenant] and not sequence.num_preemptions:
            others = (self._served[other] for other in self._waiting if other != tenant)
            self._served[tenant] = max(self._served[tenant], min(others, default=self._floor))
        self._waiting[tenant] += 1
        self._num_prioritised += sequence.request.turn.priority != 0

    def leave(self, sequence: Sequence) -> None:
        """It waits no more."""
        tenant = sequence.request.salt
        self._waiting[tenant] -= 1
        self._num_prioritised -= sequence.request.turn.priority != 0
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._floor = self._served[tenant]

    def begin(self, sequence: Sequence) -> None:
        """It starts to run: charge what is to be computed of its prompt, once."""
        if not sequence.num_preemptions:
            self._charge(sequence, PROMPT_COST * sequence.num_uncomputed)

    def settle(self, sequence: Sequence) -> None:
        """Charge the output that it was given since the last time."""
        num_output = len(sequence.token_ids) - sequence.num_prompt
        self._charge(sequence, OUTPUT_COST * (num_output - sequence.num_charged))
        sequence.num_charged = num_output

    def order(self, waiting: Iterable[Sequence], running: Iterable[Sequence]) -> Iterator[Sequence]:
        """The waiting ones by turn; preempted ones first. What is charged meanwhile counts."""
        by_priority = list(waiting)
        if self._num_prioritised:
            by_priority.sort(key=_urgency)
        if len(self._waiting) < 2:
            yield from by_priority
            return
        queues: defaultdict[str, deque[Sequence]] = defaultdict(deque)
        preempted = []
        for sequence in by_priority:
            if sequence.num_preemptions:
                preempted.append(sequence)
            else:
                queues[sequence.request.salt].append(sequence)
        for sequence in running:
            self.settle(sequence)
        yield from preempted
        heap = [(self._served[tenant], i, tenant) for i, tenant in enumerate(queues)]
        heapq.heapify(heap)
        while heap:
            _, i, tenant = heap[0]
            yield queues[tenant].popleft()
            if queues[tenant]:
                heapq.heapreplace(heap, (self._served[tenant], i, tenant))
            else:
                heapq.heappop(heap)

    def _charge(self, sequence: Sequence, cost: float) -> None:
        request = sequence.request
        load = 1.0 if request.generation is None else self._load_of(request.generation)
        self._served[request.salt] += cost * load / request.turn.weight


def _urgency(sequence: Sequence) -> tuple[bool, int]:
    """Preempted ones first; of equals the first to arrive."""
    return not sequence.num_preemptions, sequence.request.turn.priority
