"""The admin door over HTTP: publish, list, inspect, pin, alias, evict and delete adapters.

Reads requests and writes answers; the operations are `adapters`'. `expected_generation` may also
come as an If-Match header; when it does not hold the answer is 409.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from loriner.api import body, upload
from loriner.api.access import Caller, Right
from loriner.api.adapters import Placed
from loriner.api.auth import NOTHING, GuardedRoute, Told
from loriner.api.responses import json_response
from loriner.api.schema_base import MAX_NAME_CHARS, Body
from loriner.api.shared import Shared
from loriner.api.standing import status_of
from loriner.errors import InvalidRequestError

if TYPE_CHECKING:
    from loriner.adapters.records import PublishReport

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

    def __init__(self, shared: Shared) -> None:
        self._service = shared.service
        self._adapters = shared.adapters
        self._config = shared.config

    def routes(self) -> list[GuardedRoute]:
        def route(
            path: str,
            method: str,
            right: Right,
            endpoint: Callable[..., Any],
            told: Told = NOTHING,
        ) -> GuardedRoute:
            return GuardedRoute(path, endpoint, right=right, methods=[method], told=told)

        upload = Told(
            PublishBody,
            form=(
                "name",
                "expected_generation",
                "adapter_config.json",
                "adapter_model.safetensors",
            ),
            files=("adapter_config.json", "adapter_model.safetensors"),
            statuses=(201,),
        )

        one = "/admin/adapters/{name:path}"
        return [
            route("/admin/adapters", "POST", Right.PUBLISH, self.publish, upload),
            route("/admin/adapters", "GET", Right.READ, self.list_adapters),
            route(f"{one}/pin", "POST", Right.ADMIN, self.pin),
            route(f"{one}/unpin", "POST", Right.ADMIN, self.unpin),
            route(f"{one}/evict", "POST", Right.PUBLISH, self.evict),
            route(one, "GET", Right.READ, self.inspect),
            route(one, "DELETE", Right.PUBLISH, self.delete),
            route(
                "/admin/aliases/{name:path}", "PUT", Right.PUBLISH, self.set_alias, Told(AliasBody)
            ),
            route("/admin/status", "GET", Right.ADMIN, self.status),
            route("/admin/drain", "POST", Right.ADMIN, self.drain),
        ]

    async def publish(self, request: Request) -> Response:
        async with self._adapters.upload(request.state.caller) as folder:
            if _content_type(request) == "multipart/form-data":
                report = await self._publish_files(request, folder)
            else:
                report = await self._publish_path(request, folder)
        return json_response(report, 201, {"etag": f'"{report.generation}"'})

    async def _publish_files(self, request: Request, folder: Path) -> PublishReport:
        received = await upload.receive(request, folder, self._config.max_upload_bytes)
        name = received.fields.get("name")
        if not name:
            raise InvalidRequestError("Missing required parameter: 'name'.", "name")
        expected = _expected(request, received.fields.get("expected_generation"))
        return await self._adapters.publish_files(
            request.state.caller, folder, received.files, name, expected
        )

    async def _publish_path(self, request: Request, folder: Path) -> PublishReport:
        asked = await body.parse(request, PublishBody, self._config.max_body_bytes)
        expected = _expected(request, asked.expected_generation)
        return await self._adapters.publish_path(
            request.state.caller, folder, asked.path, asked.name, expected
        )

    async def list_adapters(self, request: Request) -> Response:
        found = await self._adapters.all_of(request.state.caller)
        return json_response({"adapters": [_entry(placed) for placed in found]})

    async def inspect(self, request: Request) -> Response:
        placed, history = await self._adapters.get(*_asked(request))
        answer = {**_entry(placed), "history": history}
        return json_response(answer, headers={"etag": f'"{placed.record.generation}"'})

    async def pin(self, request: Request) -> Response:
        return json_response(await self._adapters.set_pinned(*_asked(request), True))

    async def unpin(self, request: Request) -> Response:
        return json_response(await self._adapters.set_pinned(*_asked(request), False))

    async def evict(self, request: Request) -> Response:
        return json_response(await self._adapters.evict(*_asked(request)))

    async def delete(self, request: Request) -> Response:
        return json_response(
            await self._adapters.delete(*_asked(request), _expected(request, None))
        )

    async def set_alias(self, request: Request) -> Response:
        asked = await body.parse(request, AliasBody, self._config.max_body_bytes)
        expected = _expected(request, asked.expected_generation)
        record = await self._adapters.set_alias(*_asked(request), asked.target, expected)
        return json_response(record, headers={"etag": f'"{record.generation}"'})

    async def status(self, request: Request) -> Response:
        return json_response(status_of(self._service))

    async def drain(self, request: Request) -> Response:
        return json_response({"num_open": self._service.drain()})


def _asked(request: Request) -> tuple[Caller, str]:
    """Who asks, and the adapter that the path names."""
    return request.state.caller, request.path_params["name"]


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _entry(placed: Placed) -> dict[str, Any]:
    """One flat object: the record, and where its generation is now."""
    entry: dict[str, Any] = msgspec.to_builtins(placed)
    return {**entry.pop("record"), **entry}


def _expected(request: Request, given: str | None) -> str | None:
    """`expected_generation` as given, else from If-Match; "" means that the name must be new."""
    if given is not None:
        return given
    if request.headers.get("if-none-match", "").strip() == "*":
        return ""
    etag = request.headers.get("if-match", "").strip().removeprefix("W/").strip('"')
    return etag if etag and etag != "*" else None
