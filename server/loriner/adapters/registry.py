"""Generations and their tiers inside the engine: disk -> host -> seat, loaded beside the running
steps.

`want` is asked by the scheduler and never blocks: reading, checking and packing happen on loader
threads. Knows no names and no tenants; a generation is a digest. Each call costs what changed, not
what is known. Invariant: a generation that failed to load is reported once to each sequence that
waits for it, and tried again for the next one.
"""

from __future__ import annotations

import enum
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

from loriner.adapters.memory import Weights
from loriner.adapters.pool import Pool
from loriner.errors import AdapterTooLargeError

Source = Callable[[str], Weights]  # reads, verifies and packs one generation; runs on threads


class Readiness(enum.Enum):
    """What the scheduler may do with a sequence of a generation."""

    SEATED = "seated"  # it can run in this step
    LOADING = "loading"  # it will come; ask again next step
    NO_SEAT = "no seat"  # it is on the host, but every seat is in use
    FAILED = "failed"  # `take_failure` says why


class Known(NamedTuple):
    """Where one generation is."""

    generation: str
    tier: str  # disk, host or gpu
    num_bytes: int
    num_loads: int
    last_load_s: float


class _Entry:
    __slots__ = ("failure", "last_load_s", "num_bytes", "num_loads", "weights")

    def __init__(self) -> None:
        self.weights: Weights | None = None  # the host's copy
        self.failure: Exception | None = None
        self.num_bytes = 0
        self.num_loads = 0
        self.last_load_s = 0.0


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
        self.is_wanted: Callable[[str], bool] = lambda generation: True  # set by the scheduler
        self._source = source
        self._on_loaded = on_loaded
        self._entries: dict[str, _Entry] = {}
        # Copies on the host, least recently used first: those that wait for a seat or may need one
        # again, and those whose generation has a seat with a copy of its own.
        self._unseated: OrderedDict[str, None] = OrderedDict()
        self._spare: OrderedDict[str, None] = OrderedDict()
        self._arriving: dict[str, bool] = {}  # held while copied -> whether it could be taken once
        self._largest = 0  # bytes of the largest generation so far
        self._changed: dict[str, None] = {}
        self._queue: OrderedDict[str, None] = OrderedDict()  # to be loaded, in order
        self._loading: set[str] = set()  # what the threads have
        self._jobs: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[str, Weights | Exception, float]] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"adapter-loader-{i}", daemon=True)
            for i in range(num_loaders)
        ]
        for thread in self._threads:
            thread.start()

    def want(self, generation: str) -> Readiness:
        """Move `generation` toward a seat as far as possible without waiting."""
        entry = self._entries.get(generation)
        if entry is None:
            entry = self._entries[generation] = _Entry()
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
        entry = self._entries.setdefault(generation, _Entry())
        entry.failure = None
        if entry.weights is None and generation not in self.pool:
            self._start(generation)

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
        while not self._done.empty():
            generation, result, seconds = self._done.get()
            self._loading.discard(generation)
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
        entry = self._entries.get(generation)
        return "host" if entry and entry.weights else "disk"

    def known(self) -> list[tuple[str, int, int, float]]:
        """(generation, bytes, loads, seconds of the last load) of all that are above the disk."""
        return [
            (g, e.num_bytes, e.num_loads, e.last_load_s)
            for g, e in self._entries.items()
            if e.weights or g in self.pool
        ]

    def take_changes(self, limit: int) -> list[Known]:
        """At most `limit` generations whose tier or loads changed since they were last taken."""
        changes: list[Known] = []
        while self._changed and len(changes) < limit:
            generation = next(iter(self._changed))
            del self._changed[generation]
            e = self._entries.get(generation) or _Entry()
            tier = self.tier(generation)
            changes.append(Known(generation, tier, e.num_bytes, e.num_loads, e.last_load_s))
        return changes

    def check_integrity(self) -> None:
        """Assert what the counters say; costs what is known."""
        own = [g for g, e in self._entries.items() if e.weights and self._has_own_copy(g)]
        assert self.host_used_bytes == sum(self._entries[g].num_bytes for g in own)
        assert set(own) == set(self._unseated) | set(self._spare) | (set(self._arriving) & set(own))
        assert all(g in self.pool for g in chain(self._spare, self._arriving))
        assert all(g not in self.pool for g in self._unseated)
        self.pool.check_integrity()

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout=5)
        self.pool.close()

    def _take_failed(self, generation: str, failure: Exception) -> None:
        self._entries.setdefault(generation, _Entry()).failure = failure
        if not self._is_needed(generation):
            del self._entries[generation]  # nobody is left to hear of it

    def _take_loaded(self, generation: str, weights: Weights, seconds: float) -> None:
        entry = self._entries.setdefault(generation, _Entry())
        assert entry.weights is None and generation not in self.pool
        entry.last_load_s = seconds
        entry.num_loads += 1
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
        self._changed[generation] = None
        if generation in self.pool.kept and self.pool.has_room(weights):
            self._seat(generation, weights)

    def _seat(self, generation: str, weights: Weights) -> None:
        """Seat it; while its bytes are on their way the seat is held for who wants it."""
        for victim in self.pool.seat(generation, weights):
            self._leave_seat(victim)
        del self._unseated[generation]
        self._changed[generation] = None
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
        self._changed[generation] = None
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
        self._changed[generation] = None
        self._spare.pop(generation, None)
        if generation in self._unseated:
            del self._unseated[generation], self._entries[generation]

    def _start(self, generation: str) -> None:
        if generation not in self._loading and generation not in self._queue:
            self._queue[generation] = None
            self._feed()

    def _feed(self) -> None:
        """Give idle loaders the next generations, unless copies that wait for a seat fill the
        host. Room is made before a load, not after."""
        while self._queue and len(self._loading) < len(self._threads):
            coming = (len(self._loading) + 1) * self._largest
            self._trim(coming)
            if self.host_used_bytes + (coming if self._loading else 1) > self.host_bytes:
                return
            generation, _ = self._queue.popitem(last=False)
            if self._is_needed(generation):
                self._loading.add(generation)
                self._jobs.put(generation)
            elif self._entries[generation].weights is None:
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

    def _run(self) -> None:
        while (generation := self._jobs.get()) is not None:
            start = time.monotonic()
            result: Weights | Exception
            try:
                result = self._source(generation)
            except Exception as error:  # noqa: BLE001  a loader that dies would hang later loads
                result = error
            self._done.put((generation, result, time.monotonic() - start))
            self._on_loaded()
