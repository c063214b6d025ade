"""Generations and their tiers inside the engine: disk -> host -> seat, loaded beside the running
steps.

`want` is asked by the scheduler and never blocks: reading, checking and packing happen on loader
threads. Knows no names and no tenants; a generation is a digest. Each call costs what changed, not
what is known. Invariant: a generation that failed to load is reported once to each sequence that
waits for it, and tried again for the next one.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from loriner.adapters.loaders import Loaders, Source
from loriner.adapters.memory import Weights
from loriner.adapters.pool import Pool
from loriner.errors import AdapterTooLargeError


class Readiness(enum.Enum):
    """What the scheduler may do with a sequence of a generation."""

    SEATED = "seated"  # it can run in this step
    LOADING = "loading"  # it will come; ask again next step
    NO_SEAT = "no seat"  # it is on the host, but every seat is in use
    FAILED = "failed"  # `take_failure` says why


@dataclass(slots=True)
class Known:
    """One generation that was asked for."""

    weights: Weights | None = None  # the host's copy
    failure: Exception | None = None
    num_bytes: int = 0
    num_loads: int = 0
    last_load_s: float = 0.0


class Registry:
    """Loads generations on demand, keeps the recent ones on the host, seats them in the pool."""

    def __init__(
        self,
        source: Source,
        pool: Pool,
        host_bytes: int,
        on_loaded: Callable[[], None],
        *,
        num_loaders: int | None = None,
    ) -> None:
        """`on_loaded` wakes an engine that has nothing to run. Loaders: one where they need the
        CPUs that steps run on, else three."""
        if num_loaders is None:
            num_loaders = 1 if pool.memory.shares_host else 3
        self.pool = pool
        self.host_bytes = host_bytes
        self.host_used_bytes = 0  # of copies that have memory of their own, beside a seat's
        self.num_loads = 0
        self.is_wanted: Callable[[str], bool] = lambda generation: True  # set by the scheduler
        self.loaders = Loaders(source, num_loaders, on_loaded)
        self._on_loaded = on_loaded
        self._entries: dict[str, Known] = {}
        # Copies on the host, least recently used first: those that wait for a seat or may need one
        # again, and those whose generation has a seat with a copy of its own.
        self._unseated: OrderedDict[str, None] = OrderedDict()
        self._spare: OrderedDict[str, None] = OrderedDict()
        self._arriving: dict[str, bool] = {}  # held while copied -> whether it could be taken once
        self._largest = 0  # bytes of the largest generation so far
        self._changed: set[str] = set()
        self._queue: OrderedDict[str, None] = OrderedDict()  # to be loaded, in order

    def want(self, generation: str) -> Readiness:
        """Move `generation` toward a seat as far as possible without waiting."""
        entry = self._entries.get(generation)
        if entry is None:
            entry = self._entries[generation] = Known()
        for copies in (self._unseated, self._spare):
            if generation in copies:
                copies.move_to_end(generation)
        if generation in self.pool:
            ready = self.pool.is_ready(generation)
            return Readiness.SEATED if ready else Readiness.LOADING
        if entry.failure is not None:
            return Readiness.FAILED
        if entry.weights is None:
            self._start(generation)
            return Readiness.LOADING
        if not self.pool.can_seat(entry.weights):
            return Readiness.NO_SEAT
        self._seat(generation, entry.weights)
        self._trim()
        return Readiness.SEATED if self.pool.is_ready(generation) else Readiness.LOADING

    def prefetch(self, generation: str) -> None:
        """Start loading to the host if it is not there."""
        entry = self._entries.setdefault(generation, Known())
        entry.failure = None
        if entry.weights is None and generation not in self.pool:
            self._start(generation)

    def keep(self, generations: Iterable[str]) -> None:
        """Load these and hold them whatever else wants their seats; let all others go."""
        kept = frozenset(generations)
        self._changed |= kept ^ self.pool.kept
        self.pool.kept = kept
        for generation in kept:
            self.prefetch(generation)

    def take_failure(self, generation: str) -> Exception:
        """Why the load failed; forgets it, so that a later sequence tries again."""
        failure = self._entries[generation].failure
        assert failure is not None
        del self._entries[generation]
        return failure

    def poll(self) -> None:
        """Take in what was loaded and what was copied, and give the loaders their next. Called
        between steps. Raises EngineFailedError when a copy failed."""
        for generation in list(self._arriving):
            self._await_arrival(generation)
        for generation, result, seconds in self.loaders.take():
            if isinstance(result, Exception):
                self._take_failed(generation, result)
            else:
                self._take_loaded(generation, result, seconds)
        self._trim()
        self._feed()

    def evict(self, generation: str) -> bool:
        """Drop `generation` from seat and host unless it is running; says whether it is gone."""
        if not self.pool.can_evict(generation):
            return False
        if generation in self.pool:
            self.pool.evict(generation)
            self._leave_seat(generation)
        if generation in self._unseated:
            self._drop(generation)
        self._entries.pop(generation, None)
        return True

    def tier(self, generation: str) -> str:
        if generation in self.pool:
            return "gpu"
        return "host" if self.known(generation).weights else "disk"

    def known(self, generation: str) -> Known:
        return self._entries.get(generation) or Known()

    def take_changes(self) -> set[str]:
        """Generations whose tier, loads or hold changed since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def check_integrity(self) -> None:
        """Assert what the counters say; costs what is known."""
        own = [g for g, e in self._entries.items() if e.weights and self._has_own_copy(g)]
        assert self.host_used_bytes == sum(self._entries[g].num_bytes for g in own)
        assert set(own) == set(self._unseated) | set(self._spare) | (set(self._arriving) & set(own))
        assert all(g in self.pool for g in chain(self._spare, self._arriving))
        assert all(g not in self.pool for g in self._unseated)
        self.pool.check_integrity()

    def close(self) -> None:
        self.loaders.close()
        self.pool.close()

    def _take_failed(self, generation: str, failure: Exception) -> None:
        self._entries.setdefault(generation, Known()).failure = failure
        if not self._is_needed(generation):
            del self._entries[generation]  # nobody is left to hear of it

    def _take_loaded(self, generation: str, weights: Weights, seconds: float) -> None:
        entry = self._entries.setdefault(generation, Known())
        assert entry.weights is None and generation not in self.pool
        entry.last_load_s = seconds
        entry.num_loads += 1
        self.num_loads += 1
        entry.num_bytes = weights.num_bytes
        if weights.num_bytes > self.pool.budget_bytes:
            weights.free()
            entry.failure = AdapterTooLargeError(
                f"The adapter needs {weights.num_bytes} bytes; the pool has "
                f"{self.pool.budget_bytes} (pool_bytes)."
            )
            return
        entry.weights = weights
        self._largest = max(self._largest, weights.num_bytes)
        self._unseated[generation] = None
        self.host_used_bytes += weights.num_bytes
        self._changed.add(generation)
        if generation in self.pool.kept and self.pool.has_room(weights):
            self._seat(generation, weights)

    def _seat(self, generation: str, weights: Weights) -> None:
        """Seat it; while its bytes are on their way the seat is held for who wants it."""
        for victim in self.pool.seat(generation, weights):
            self._leave_seat(victim)
        del self._unseated[generation]
        self._changed.add(generation)
        if self.pool.memory.shares_host:
            self.host_used_bytes -= weights.num_bytes
        else:
            self.pool.acquire(generation)
            self._arriving[generation] = False

    def _await_arrival(self, generation: str) -> None:
        """Hold a seat until the scheduler has had one chance to take it, then no longer: a seat
        that nobody can use yet must not keep others waiting."""
        if not self.pool.is_ready(generation):
            return
        if self._arriving[generation]:
            self.pool.release(generation)
            del self._arriving[generation]
            self._spare[generation] = None
        else:
            self._arriving[generation] = True
            self._on_loaded()  # an engine with nothing to run looks again when the hold has ended

    def _leave_seat(self, generation: str) -> None:
        """What is left of a generation that lost its seat."""
        entry = self._entries[generation]
        self._changed.add(generation)
        self._spare.pop(generation, None)
        if entry.weights is None:
            del self._entries[generation]
            return
        self._unseated[generation] = None
        if self.pool.memory.shares_host:
            self.host_used_bytes += entry.num_bytes

    def _drop(self, generation: str) -> None:
        """Give up the host's copy."""
        entry = self._entries[generation]
        assert entry.weights is not None
        entry.weights.free()
        entry.weights = None
        self.host_used_bytes -= entry.num_bytes
        self._changed.add(generation)
        self._spare.pop(generation, None)
        if generation in self._unseated:
            del self._unseated[generation], self._entries[generation]

    def _start(self, generation: str) -> None:
        if generation not in self.loaders.loading and generation not in self._queue:
            self._queue[generation] = None
            self._feed()

    def _feed(self) -> None:
        """Give idle loaders the next generations, unless copies that wait for a seat fill the
        host. Room is made before a load, not after."""
        while self._queue and self.loaders.can_begin():
            num_loading = len(self.loaders.loading)
            coming = (num_loading + 1) * self._largest
            self._trim(coming)
            if self.host_used_bytes + (coming if num_loading else 1) > self.host_bytes:
                return
            generation, _ = self._queue.popitem(last=False)
            if self._is_needed(generation):
                self.loaders.begin(generation)
            elif generation in self._entries and self._entries[generation].weights is None:
                del self._entries[generation]

    def _is_needed(self, generation: str) -> bool:
        return self.is_wanted(generation) or generation in self.pool.kept

    def _has_own_copy(self, generation: str) -> bool:
        return not (self.pool.memory.shares_host and generation in self.pool)

    def _trim(self, coming: int = 0) -> None:
        """Forget copies beyond the host's budget, less `coming` bytes; least recently used first,
        those of seated generations before others, and none that a sequence waits for."""
        excess = self.host_used_bytes + coming - self.host_bytes
        if excess <= 0:
            return
        dropped = []
        for generation in self._droppable():
            dropped.append(generation)
            excess -= self._entries[generation].num_bytes
            if excess <= 0:
                break
        for generation in dropped:
            self._drop(generation)

    def _droppable(self) -> Iterator[str]:
        yield from self._spare
        for generation in self._unseated:
            if not self.is_wanted(generation):
                yield generation
