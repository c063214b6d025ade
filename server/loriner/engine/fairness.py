"""Whose turn it is: weighted virtual token counters of tenants (VTC: Sheng et al., OSDI 2024,
arXiv 2401.00588).

A tenant's counter grows with what it is served, over its weight; the one with the smallest is next,
within it those that run, then by priority and arrival. Knows no blocks and no seats. Invariant: a
tenant that begins to wait is lifted to `HEAD_START` below the smallest counter of those that wait,
so that idling earns no more than that.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator

from loriner.core import Sequence

PROMPT_COST = 1.0  # of a computed prompt token
OUTPUT_COST = 2.0  # of an output token
HEAD_START = 512.0  # cost: what one who comes back may be given before others


class Turns:
    """`load_of`: how many times a token's cost one of this generation has."""

    def __init__(self, load_of: Callable[[str], float]) -> None:
        self._load_of = load_of
        self._served: defaultdict[str, float] = defaultdict(float)
        self._weight: dict[str, float] = {}
        self._waiting: Counter[str] = Counter()
        self._running: defaultdict[str, dict[Sequence, None]] = defaultdict(dict)
        self._num_prioritised = 0  # of those that wait
        self._floor = 0.0  # counter of the last tenant that stopped waiting

    def served(self, tenant: str) -> float:
        return self._served[tenant]

    def weight(self, tenant: str) -> float:
        return self._weight[tenant]

    @property
    def contested(self) -> bool:
        """Whether more than one tenant waits or runs."""
        one, other = self._waiting, self._running
        return max(len(one), len(other)) > 1 or bool(one and other and one.keys() != other.keys())

    @property
    def claimable(self) -> bool:
        """Whether a tenant that waits has so few places that another might owe it one."""
        weight, running = self._weight, self._running
        most = max(((len(held) - 1) / weight[who] for who, held in running.items()), default=0.0)
        return most > 0 and any(
            (len(running.get(who, ())) + 1) / weight[who] <= most for who in self._waiting
        )

    def join(self, sequence: Sequence) -> None:
        """It begins to wait."""
        tenant = sequence.request.salt
        self._weight[tenant] = sequence.request.turn.weight
        if not self._waiting[tenant] and not sequence.num_preemptions:
            self.settle()
            others = (self._served[other] for other in self._waiting if other != tenant)
            least = min(others, default=self._floor) - HEAD_START
            self._served[tenant] = max(self._served[tenant], least)
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
        """It starts to run. What the cache has of it costs nothing, what is computed again is not
        charged again."""
        self._running[sequence.request.salt][sequence] = None
        if not sequence.num_preemptions:
            sequence.num_charged = sequence.num_computed

    def end(self, sequence: Sequence) -> None:
        """It runs no more."""
        tenant = sequence.request.salt
        self._settle(sequence)
        del self._running[tenant][sequence]
        if not self._running[tenant]:
            del self._running[tenant]

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Charge its first `num_tokens` tokens, but for those that were."""
        charged, num_prompt = sequence.num_charged, sequence.num_prompt
        if num_tokens <= charged:
            return
        num_output = max(0, num_tokens - max(charged, num_prompt))
        cost = PROMPT_COST * (num_tokens - charged - num_output) + OUTPUT_COST * num_output
        request = sequence.request
        load = 1.0 if request.generation is None else self._load_of(request.generation)
        self._served[request.salt] += cost * load / request.turn.weight
        sequence.num_charged = num_tokens

    def settle(self) -> None:
        """Charge what the running ones were given since the last time."""
        for running in self._running.values():
            for sequence in running:
                self._settle(sequence)

    def order(
        self, running: Iterable[Sequence], waiting: Iterable[Sequence], passed: set[str]
    ) -> Iterator[Sequence]:
        """All of them by turn. What is charged meanwhile counts; tenants that come to be in
        `passed` meanwhile have no more turns."""
        queues: defaultdict[str, deque[Sequence]] = defaultdict(deque)
        for sequence in running:
            queues[sequence.request.salt].append(sequence)
        for sequence in sorted(waiting, key=_urgency) if self._num_prioritised else waiting:
            queues[sequence.request.salt].append(sequence)
        heap = [(*self._place(tenant), i, tenant) for i, tenant in enumerate(queues)]
        heapq.heapify(heap)
        while heap:
            *_, i, tenant = heap[0]
            if tenant in passed or not queues[tenant]:
                heapq.heappop(heap)
                continue
            yield queues[tenant].popleft()
            heapq.heapreplace(heap, (*self._place(tenant), i, tenant))

    def _place(self, tenant: str) -> tuple[float, int]:
        return self._served[tenant], len(self._running.get(tenant, ()))

    def _settle(self, sequence: Sequence) -> None:
        if len(sequence.token_ids) > sequence.num_prompt:
            self.charge(sequence, len(sequence.token_ids))


def _urgency(sequence: Sequence) -> tuple[bool, int]:
    """Preempted ones first; of equals the first to arrive."""
    return not sequence.num_preemptions, sequence.request.turn.priority
