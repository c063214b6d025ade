"""Generations and their tiers inside the engine: disk -> host -> seat, loaded beside the running
steps.

`want` is asked by the scheduler and never blocks: reading, checking and packing happen on a loader
thread. Knows no names and no tenants; a generation is a digest. Invariant: a generation that failed
to load is reported once to each sequence that waits for it, and tried again for the next one.
"""

from __future__ import annotations

import enum
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from loriner.adapters.pool import Pool, SeatWeights
from loriner.errors import AdapterTooLargeError, LorinerError

Source = Callable[[str], SeatWeights]  # reads, verifies and packs one generation; runs on a thread


class Readiness(enum.Enum):
    """What the scheduler may do with a sequence of a generation."""

    SEATED = "seated"  # it can run in this step
    LOADING = "loading"  # it will come; ask again next step
    NO_SEAT = "no seat"  # it is on the host, but every seat is in use
    FAILED = "failed"  # `take_failure` says why


class _Entry:
    __slots__ = ("failure", "last_load_s", "num_loads", "weights")

    def __init__(self) -> None:
        self.weights: SeatWeights | None = None
        self.failure: Exception | None = None
        self.num_loads = 0
        self.last_load_s = 0.0


class Registry:
    """Loads generations on demand, keeps the recent ones on the host, seats them in the pool."""

    def __init__(self, source: Source, pool: Pool, host_bytes: int, on_loaded: Callable[[], None]):
        self.pool = pool
        self.host_bytes = host_bytes
        self._source = source
        self._on_loaded = on_loaded
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self.is_wanted: Callable[[str], bool] = lambda generation: True  # set by the scheduler
        self._queue: OrderedDict[str, None] = OrderedDict()  # to be loaded, in order
        self._loading: str | None = None  # what the thread has
        self._jobs: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[str, SeatWeights | Exception, float]] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    @property
    def host_used_bytes(self) -> int:
        """Bytes of copies that have no seat."""
        return sum(self._unseated_bytes(generation) for generation in self._entries)

    def want(self, generation: str) -> Readiness:
        """Move `generation` toward a seat as far as possible without waiting."""
        entry = self._entries.setdefault(generation, _Entry())
        self._entries.move_to_end(generation)
        if generation in self.pool:
            return Readiness.SEATED
        if entry.failure is not None:
            return Readiness.FAILED
        if entry.weights is None:
            self._start(generation)
            return Readiness.LOADING
        if not self.pool.can_seat(entry.weights.num_bytes):
            return Readiness.NO_SEAT
        self.pool.seat(generation, entry.weights)
        self._trim()
        return Readiness.SEATED

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
        """Take in what the loader finished and give it the next. Called between steps."""
        while not self._done.empty():
            generation, result, seconds = self._done.get()
            self._loading = None
            entry = self._entries.setdefault(generation, _Entry())
            if isinstance(result, Exception):
                entry.failure = result
                if not self._is_needed(generation):
                    del self._entries[generation]  # nobody is left to hear of it
                continue
            entry.weights, entry.last_load_s = result, seconds
            entry.num_loads += 1
            if result.num_bytes > self.pool.budget_bytes:
                entry.weights = None
                entry.failure = AdapterTooLargeError(
                    f"The adapter needs {result.num_bytes} bytes; the pool has "
                    f"{self.pool.budget_bytes} (pool_bytes)."
                )
            elif generation in self.pool.kept and self.pool.has_room(result.num_bytes):
                self.pool.seat(generation, result)
        self._trim()
        self._feed()

    def evict(self, generation: str) -> bool:
        """Drop `generation` from seat and host unless it is running; says whether it is gone."""
        if not self.pool.can_evict(generation):
            return False
        self.pool.evict(generation)
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
            (g, e.weights.num_bytes, e.num_loads, e.last_load_s)
            for g, e in self._entries.items()
            if e.weights
        ]

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(timeout=5)

    def _start(self, generation: str) -> None:
        if generation != self._loading:
            self._queue[generation] = None
            self._feed()

    def _feed(self) -> None:
        """Give the loader its next generation, unless copies that wait for a seat fill the host."""
        while self._queue and self._loading is None:
            waiting = sum(self._unseated_bytes(g) for g in self._entries if self.is_wanted(g))
            if waiting >= self.host_bytes:
                return
            generation, _ = self._queue.popitem(last=False)
            if self._is_needed(generation):
                self._loading = generation
                self._jobs.put(generation)
            elif self._entries[generation].weights is None:
                del self._entries[generation]

    def _is_needed(self, generation: str) -> bool:
        return self.is_wanted(generation) or generation in self.pool.kept

    def _unseated_bytes(self, generation: str) -> int:
        weights = self._entries[generation].weights
        return weights.num_bytes if weights and generation not in self.pool else 0

    def _trim(self) -> None:
        """Forget copies without a seat beyond the host's budget, least recently used first, but
        none that a sequence waits for."""
        excess = self.host_used_bytes - self.host_bytes
        for generation in list(self._entries):
            if excess <= 0:
                return
            num_bytes = self._unseated_bytes(generation)
            if num_bytes and not self.is_wanted(generation):
                excess -= num_bytes
                del self._entries[generation]

    def _run(self) -> None:
        while (generation := self._jobs.get()) is not None:
            start = time.monotonic()
            result: SeatWeights | Exception
            try:
                result = self._source(generation)
            except (LorinerError, OSError, MemoryError) as error:
                result = error
            except Exception as error:  # noqa: BLE001  a loader thread that dies would hang every later load
                result = error
            self._done.put((generation, result, time.monotonic() - start))
            self._on_loaded()
