"""The generations that requests were admitted with, held in the store until their streams close.

Knows no engine. Invariant: what was acquired is released once, whoever leaves in between; of the
parts of a mixture each is held, or none is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from loriner.adapters.mixture import Mixture, Served, generations
from loriner.adapters.records import AdapterRecord
from loriner.adapters.store import Store
from loriner.core import Scaled
from loriner.engine.admission import check_mixture
from loriner.errors import LorinerError

logger = logging.getLogger(__name__)


class Holds:
    """Resolves and holds on threads; releases in the background."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tasks: set[asyncio.Task[None]] = set()

    async def acquire(self, adapters: str | Sequence[Scaled]) -> Served:
        """One by name, or several that add up. Raises AdapterNotFoundError."""
        if isinstance(adapters, str):
            return await self._acquire(adapters)
        records: list[AdapterRecord] = []
        try:
            for name, _ in adapters:
                records.append(await self._acquire(name))
            check_mixture(records)
        except BaseException:
            for record in records:
                self.release(record.generation)
            raise
        if [scale for _, scale in adapters] == [1.0]:
            return records[0]
        return Mixture(tuple(records), tuple(scale for _, scale in adapters))

    @asynccontextmanager
    async def holding(self, adapters: Sequence[Scaled]) -> AsyncIterator[None]:
        """Until it is left. Raises what `acquire` raises; of the base there is nothing to hold."""
        held = generations(await self.acquire(adapters) if adapters else None)
        try:
            yield
        finally:
            for generation in held:
                self.release(generation)

    def release(self, generation: str) -> None:
        """Give up one hold, on a thread: the last one may delete files."""

        async def release() -> None:
            try:
                await asyncio.to_thread(self._store.release, generation)
            except LorinerError:
                logger.exception("generation %s could not be released", generation)

        self.in_background(release())

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`; `wait` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait(self, timeout_s: float) -> None:
        """For releases that are under way."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    async def _acquire(self, adapter: str) -> AdapterRecord:
        """A caller that leaves meanwhile leaves no hold behind."""
        task = asyncio.create_task(asyncio.to_thread(self._store.acquire, adapter))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._give_back)
            raise

    def _give_back(self, task: asyncio.Task[AdapterRecord]) -> None:
        if not task.cancelled() and task.exception() is None:
            self.release(task.result().generation)
