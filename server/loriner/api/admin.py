"""The admin door: publish, list, inspect, pin, alias, evict and delete adapters.

Knows the store's words and no file format. `expected_generation` may also come as an If-Match
header; when it does not hold the answer is 409. Invariant: an upload that is not answered with 201
leaves nothing that can be served.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from loriner.adapters.names import show
from loriner.api import body, upload
from loriner.api.access import Right
from loriner.api.auth import GuardedRoute
from loriner.api.metrics import Metrics
from loriner.api.responses import json_response
from loriner.api.schema import MAX_NAME_CHARS, Body
from loriner.api.sources import Sources
from loriner.config import ServerConfig
from loriner.errors import AdapterNotFoundError, InvalidRequestError, OverloadedError

if TYPE_CHECKING:
    from loriner.adapters.records import AdapterRecord
    from loriner.engine.service import Service

T = TypeVar("T")
logger = logging.getLogger("loriner.admin")

MAX_UPLOADS = 4
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
Digest = Annotated[str, Field(max_length=64)]


class PublishBody(Body):
    """POST /admin/adapters with JSON: a folder or archive inside `adapter_root`."""

    name: Name
    path: Annotated[str, Field(min_length=1, max_length=4096)]
    expected_generation: Digest | None = None


class AliasBody(Body):
    """PUT /admin/aliases/{name}."""

    target: Name
    expected_generation: Digest | None = None


class AdminDoor:
    """Handlers and routes under /admin."""

    def __init__(self, service: Service, metrics: Metrics, config: ServerConfig) -> None:
        self._service = service
        self._metrics = metrics
        self._config = config
        self._sources = Sources(service.store.staging, config.adapter_root, config.max_upload_bytes)
        self._num_uploads = 0

    def routes(self) -> list[GuardedRoute]:
        def route(path: str, method: str, endpoint: Callable[..., Any]) -> GuardedRoute:
            return GuardedRoute(path, endpoint, right=Right.ADMIN, methods=[method])

        one = "/admin/adapters/{name:path}"
        return [
            route("/admin/adapters", "POST", self.publish),
            route("/admin/adapters", "GET", self.list_adapters),
            route(f"{one}/pin", "POST", self.pin),
            route(f"{one}/unpin", "POST", self.unpin),
            route(f"{one}/evict", "POST", self.evict),
            route(one, "GET", self.inspect),
            route(one, "DELETE", self.delete),
            route("/admin/aliases/{name:path}", "PUT", self.set_alias),
        ]

    async def publish(self, request: Request) -> Response:
        if self._num_uploads >= MAX_UPLOADS:
            raise OverloadedError(f"{MAX_UPLOADS} uploads are in flight; try again soon.", 5.0)
        self._num_uploads += 1
        try:
            async with self._sources.workspace() as folder:
                return await self._publish(request, folder)
        finally:
            self._num_uploads -= 1

    async def _publish(self, request: Request, folder: Path) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        source = "upload"
        if content_type == "multipart/form-data":
            received = await upload.receive(request, folder, self._config.max_upload_bytes)
            name, expected = _field(received, "name"), received.fields.get("expected_generation")
            clean = await asyncio.to_thread(self._sources.from_upload, folder, received.files)
        else:
            asked = await body.parse(request, PublishBody, self._config.max_body_bytes)
            name, expected = asked.name, asked.expected_generation
            clean = await asyncio.to_thread(self._sources.from_path, folder, asked.path)
            source = "path"
        expected = _expected(request, expected)
        report = await self._service.publish(
            clean, name, expected_generation=expected, source=source
        )
        logger.info("published %s as %s", report.name, report.generation)
        self._metrics.names.learn(report.generation, report.name)
        return json_response(report, 201, {"etag": f'"{report.generation}"'})

    async def list_adapters(self, request: Request) -> Response:
        records = await asyncio.to_thread(self._service.store.list, all_states=True)
        where = {entry.generation: entry for entry in self._service.stats().generations}
        return json_response({"adapters": [_entry(record, where) for record in records]})

    async def inspect(self, request: Request) -> Response:
        record = await self._record(request)
        history = await _named(request, self._service.store.history, record.name)
        where = {entry.generation: entry for entry in self._service.stats().generations}
        answer = {**_entry(record, where), "history": history}
        return json_response(answer, headers={"etag": f'"{record.generation}"'})

    async def pin(self, request: Request) -> Response:
        return await self._set_pinned(request, True)

    async def unpin(self, request: Request) -> Response:
        return await self._set_pinned(request, False)

    async def evict(self, request: Request) -> Response:
        record = await self._record(request)
        await self._service.evict(record.name)
        return json_response(record)

    async def delete(self, request: Request) -> Response:
        name = request.path_params["name"]
        expected = _expected(request, None)
        with _naming(request):
            record = await self._service.delete(name, expected_generation=expected)
        logger.info("deleted %s (%s)", record.name, record.generation)
        return json_response(record)

    async def set_alias(self, request: Request) -> Response:
        asked = await body.parse(request, AliasBody, self._config.max_body_bytes)
        expected = _expected(request, asked.expected_generation)
        record = await self._service.set_alias(
            request.path_params["name"], asked.target, expected_generation=expected
        )
        logger.info("alias %s now names %s", record.name, record.generation)
        return json_response(record, headers={"etag": f'"{record.generation}"'})

    async def _set_pinned(self, request: Request, pinned: bool) -> Response:
        record = await self._record(request)
        await self._service.set_pinned(record.name, pinned)
        return json_response(await self._record(request))

    async def _record(self, request: Request) -> AdapterRecord:
        return await _named(request, self._service.store.get, request.path_params["name"])


async def _named(request: Request, call: Callable[..., T], *args: object) -> T:
    """Run `call` in a thread; an unknown adapter is named as the path has it."""
    with _naming(request):
        return await asyncio.to_thread(call, *args)


@contextmanager
def _naming(request: Request) -> Iterator[None]:
    try:
        yield
    except AdapterNotFoundError:
        raise AdapterNotFoundError(show(request.path_params["name"]), "name") from None


def _entry(record: AdapterRecord, where: dict[str, Any]) -> dict[str, Any]:
    """The record, and where its generation is now."""
    entry: dict[str, Any] = msgspec.to_builtins(record)
    stats = where.get(record.generation)
    entry["tier"] = "disk" if stats is None else stats.tier
    for name in ("num_running", "num_waiting", "num_loads", "last_load_s"):
        entry[name] = 0 if stats is None else getattr(stats, name)
    return entry


def _field(received: upload.Upload, name: str) -> str:
    value = received.fields.get(name)
    if not value:
        raise InvalidRequestError(f"Missing required parameter: '{name}'.", name)
    return value


def _expected(request: Request, given: str | None) -> str | None:
    """`expected_generation` as given, else from If-Match; "" means that the name must be new."""
    if given is not None:
        return given
    if request.headers.get("if-none-match", "").strip() == "*":
        return ""
    etag = request.headers.get("if-match", "").strip().removeprefix("W/").strip('"')
    return etag if etag and etag != "*" else None
