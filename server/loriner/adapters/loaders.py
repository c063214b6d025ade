"""Threads that bring generations from where they are to the host, beside the running steps.

Knows no tiers and no seats. One thread calls it. Invariant: every generation that was begun comes
out of `take` once, as weights or as the reason why not.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from loriner.adapters.memory import Weights

Source = Callable[[str], Weights]  # reads, verifies and packs one generation; runs on threads


class Loaded(NamedTuple):
    """How one load ended."""

    generation: str
    result: Weights | Exception
    seconds: float


class Loaders:
    """`on_loaded` is called, on a loader's thread, whenever there is something to take."""

    def __init__(self, source: Source, num_loaders: int, on_loaded: Callable[[], None]) -> None:
        self.source = source
        self.loading: set[str] = set()  # what the threads have
        self._on_loaded = on_loaded
        self._jobs: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"adapter-loader-{i}", daemon=True)
            for i in range(num_loaders)
        ]
        for thread in self._threads:
            thread.start()

    def can_begin(self) -> bool:
        """Whether a thread is idle."""
        return len(self.loading) < len(self._threads)

    def begin(self, generation: str) -> None:
        assert self.can_begin() and generation not in self.loading
        self.loading.add(generation)
        self._jobs.put(generation)

    def take(self) -> Iterator[Loaded]:
        """What has ended since the last call."""
        while not self._done.empty():
            loaded = self._done.get()
            self.loading.discard(loaded.generation)
            yield loaded

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout=5)

    def _run(self) -> None:
        while (generation := self._jobs.get()) is not None:
            start = time.monotonic()
            result: Weights | Exception
            try:
                result = self.source(generation)
            except Exception as error:  # noqa: BLE001  a loader that dies would hang later loads
                result = error
            self._done.put(Loaded(generation, result, time.monotonic() - start))
            self._on_loaded()
