"""What callers do with adapters: publish, look up, move, keep and forget, through either door.

Knows the store's words and no file format. Every name goes through `Caller.reach`, so that a
foreign adapter looks absent. Invariant: an upload that is not answered with success leaves nothing
that can be served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from loriner.adapters.names import parse_name, show
from loriner.api.access import Caller
from loriner.api.metrics import Metrics
from loriner.api.quotas import Quotas, check_storage
from loriner.api.sources import Sources
from loriner.config import ServerConfig
from loriner.errors import AdapterNotFoundError, OverloadedError, PermissionDeniedError

if TYPE_CHECKING:
    from loriner.adapters.records import AdapterRecord, PublishReport
    from loriner.engine.service import Service
    from loriner.engine.stats import GenerationStats

T = TypeVar("T")
logger = logging.getLogger("loriner.admin")

MAX_UPLOADS = 4


@dataclass(frozen=True, slots=True)
class Placed:
    """A record, and where its generation is now."""

    record: AdapterRecord
    tier: str = "disk"
    num_running: int = 0
    num_waiting: int = 0
    num_loads: int = 0
    last_load_s: float = 0.0


class Adapters:
    """The operations on adapters, each on behalf of a caller."""

    def __init__(
        self, service: Service, metrics: Metrics, config: ServerConfig, quotas: Quotas
    ) -> None:
        self._service = service
        self._quotas = quotas
        self._metrics = metrics
        self._sources = Sources(service.store.staging, config.adapter_root, config.max_upload_bytes)
        self._places = asyncio.Semaphore(MAX_UPLOADS)

    @contextlib.asynccontextmanager
    async def upload(self, caller: Caller, patience_s: float = 0.0) -> AsyncIterator[Path]:
        """A place among the uploads in flight, waited for so long: an empty folder, gone at the
        end. Raises OverloadedError."""
        try:
            async with asyncio.timeout(patience_s):
                await self._places.acquire()
        except TimeoutError:
            message = f"{MAX_UPLOADS} uploads are in flight; try again soon."
            raise OverloadedError(message, 5.0) from None
        try:
            with self._quotas.uploading(caller.tenant):
                async with self._sources.workspace() as folder:
                    yield folder
        finally:
            self._places.release()

    async def publish_files(
        self, caller: Caller, folder: Path, files: Sequence[str], name: str, expected: str | None
    ) -> PublishReport:
        """Publish what an upload left in `folder`."""
        full = caller.reach(name, "name")
        clean = await asyncio.to_thread(self._sources.from_upload, folder, files)
        return await self._publish(clean, full, expected, "upload")

    async def publish_path(
        self, caller: Caller, folder: Path, path: str, name: str, expected: str | None
    ) -> PublishReport:
        """Publish what `path` names inside the adapter root; an archive is unpacked in `folder`."""
        if not caller.is_operator:  # the root holds every tenant's folders
            raise PermissionDeniedError("Publishing from a path needs the right `admin`.")
        full = caller.reach(name, "name")
        clean = await asyncio.to_thread(self._sources.from_path, folder, path)
        return await self._publish(clean, full, expected, "path")

    async def _publish(
        self, folder: Path, name: str, expected: str | None, source: str
    ) -> PublishReport:
        num_bytes = await asyncio.to_thread(_size, folder)
        async with self._room_for(name, num_bytes):
            report = await self._service.publish(
                folder, name, expected_generation=expected, source=source
            )
        logger.info("published %s as %s", report.name, report.generation)
        self._metrics.names.learn(report.generation, report.name)
        return report

    @contextlib.asynccontextmanager
    async def _room_for(self, name: str, num_bytes: int | None) -> AsyncIterator[None]:
        """Within its owner's quota, while nobody else stores for it."""
        full = parse_name(name)
        async with self._quotas.storing(full.tenant) as quota:
            if quota is not None:
                held = await asyncio.to_thread(
                    self._service.store.list, full.tenant, all_states=True
                )
                check_storage(quota, held, str(full), num_bytes)
            yield

    async def all_of(self, caller: Caller) -> list[Placed]:
        """By name, in whatever state."""
        listed = self._service.store.list
        records = await asyncio.to_thread(listed, caller.own_tenant, all_states=True)
        where = self._where()
        return [_place(record, where) for record in records]

    async def get(self, caller: Caller, name: str) -> tuple[Placed, list[AdapterRecord]]:
        """The adapter, and the generations that its name stood for, newest first."""
        record = await self.record(caller, name)
        history = await self._named(name, self._service.store.history, record.name)
        return _place(record, self._where()), history

    async def record(self, caller: Caller, name: str) -> AdapterRecord:
        return await self._named(name, self._service.store.get, caller.reach(name, "name"))

    async def set_pinned(self, caller: Caller, name: str, pinned: bool) -> AdapterRecord:
        record = await self.record(caller, name)
        await self._service.set_pinned(record.name, pinned)
        return await self.record(caller, name)

    async def evict(self, caller: Caller, name: str) -> AdapterRecord:
        record = await self.record(caller, name)
        await self._service.evict(record.name)
        return record

    async def delete(self, caller: Caller, name: str, expected: str | None) -> AdapterRecord:
        full = caller.reach(name, "name")
        with _naming(name):
            record = await self._service.delete(full, expected_generation=expected)
        logger.info("deleted %s (%s)", record.name, record.generation)
        return record

    async def set_alias(
        self, caller: Caller, name: str, target: str, expected: str | None
    ) -> AdapterRecord:
        full, target = caller.reach(name, "name"), caller.reach(target, "target")
        async with self._room_for(full, None):
            record = await self._service.set_alias(full, target, expected_generation=expected)
        logger.info("alias %s now names %s", record.name, record.generation)
        return record

    def place(self, record: AdapterRecord) -> Placed:
        """Where the record's generation is now."""
        return _place(record, self._where())

    def _where(self) -> dict[str, GenerationStats]:
        return {entry.generation: entry for entry in self._service.stats().generations}

    async def _named(self, name: str, call: Callable[..., T], *args: object) -> T:
        with _naming(name):
            return await asyncio.to_thread(call, *args)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """An unknown adapter is named as the caller wrote it."""
    try:
        yield
    except AdapterNotFoundError:
        raise AdapterNotFoundError(show(name), "name") from None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _place(record: AdapterRecord, where: dict[str, GenerationStats]) -> Placed:
    stats = where.get(record.generation)
    if stats is None:
        return Placed(record)
    return Placed(
        record,
        stats.tier,
        stats.num_running,
        stats.num_waiting,
        stats.num_loads,
        stats.last_load_s,
    )
