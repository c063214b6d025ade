"""Which adapters an operator keeps in memory: checked, stored with their names, told to the engine.

Invariant: whenever a name, an alias or a pin has changed, the engine holds what is pinned now.
"""

from __future__ import annotations

import asyncio
import logging

from loriner import errors
from loriner.adapters.records import AdapterRecord
from loriner.adapters.store import Store
from loriner.config import EngineConfig
from loriner.engine.messages import Keep
from loriner.engine.process import EngineProcess

logger = logging.getLogger(__name__)


class Pins:
    """The pins of `store`, as `engine` has to keep them."""

    def __init__(self, store: Store, engine: EngineProcess, config: EngineConfig) -> None:
        self._store, self._engine, self._config = store, engine, config
        self._lock = asyncio.Lock()

    async def set(self, name: str, pinned: bool) -> None:
        """Raises AdapterNotFoundError; InvalidRequestError when there is no room for one more."""
        record = await asyncio.to_thread(self._store.resolve, name)
        if pinned and not record.pinned:
            await asyncio.to_thread(self._check, record)
        await asyncio.to_thread(self._store.set_pinned, name, pinned)
        await self.sync()

    async def sync(self) -> None:
        """Tell the engine what is pinned now."""
        async with self._lock:
            try:
                records = await asyncio.to_thread(self._store.list)
            except errors.LorinerError:
                logger.exception("the pins could not be read")
                return
            self._engine.send(Keep(tuple({r.generation for r in records if r.pinned})))

    def _check(self, wanted: AdapterRecord) -> None:
        """A seat and half of the pool stay free of pins, so that no other adapter waits for
        ever."""
        pinned = {r.generation: r.num_bytes for r in self._store.list() if r.pinned}
        pinned[wanted.generation] = wanted.num_bytes
        max_seats = self._config.max_seats
        if len(pinned) >= max_seats:
            raise errors.InvalidRequestError(
                f"At most {max_seats - 1} adapters can be pinned (max_seats - 1).", "name"
            )
        # as the kernels hold them, an adapter can take twice its size on disk (bf16 to f32)
        pool_bytes = self._engine.stats.pool_bytes or self._config.pool_bytes
        if pool_bytes and 2 * sum(pinned.values()) > pool_bytes // 2:
            raise errors.InvalidRequestError(
                f"Pinned adapters may take half of the pool ({pool_bytes} bytes).", "name"
            )
