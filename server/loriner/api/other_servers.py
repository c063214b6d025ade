"""The adapter endpoints of vLLM and SGLang by their own names: load and unload.

Aliases of publish, pin and delete with those servers' codes and texts, for controllers that know
them. Invariant: what is unloaded is forgotten, and what is loaded under a name again is served
anew: no stale weights, no stale prefixes.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from loriner.adapters.names import show
from loriner.api import body
from loriner.api.access import Caller, Right
from loriner.api.auth import GuardedRoute, Told
from loriner.api.responses import json_response
from loriner.api.schema_base import MAX_NAME_CHARS, Body
from loriner.api.shared import Shared
from loriner.api.status import row_of
from loriner.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    InvalidRequestError,
    LorinerError,
)

TEXT = "text/plain"
PATIENCE_S = 60.0  # with others that are being loaded: those servers refuse none for that
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
Path = Annotated[str, Field(min_length=1, max_length=4096)]


class LoadBody(Body):
    """POST /v1/load_lora_adapter (vLLM): `lora_path` is inside the adapter root."""

    lora_name: Name
    lora_path: Path
    load_inplace: bool = False  # put it in the place of one of that name


class LoadPinnedBody(Body):
    """POST /load_lora_adapter (SGLang)."""

    lora_name: Name
    lora_path: Path
    pinned: bool = False


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter (vLLM) and /unload_lora_adapter (SGLang)."""

    lora_name: Name


class OtherServers:
    """Handlers and routes. Loading takes a path of the server's, so it is the operator's."""

    def __init__(self, shared: Shared) -> None:
        self._adapters = shared.adapters
        self._max_body_bytes = shared.config.max_body_bytes

    def routes(self) -> list[GuardedRoute]:
        def route(path: str, endpoint: Any, right: Right, asked: type[Body], media: str) -> Any:
            told = Told(asked, media=media, statuses=(200,) if media == TEXT else (200, 400))
            return GuardedRoute(path, endpoint, right=right, methods=["POST"], told=told)

        admin, publish, json = Right.ADMIN, Right.PUBLISH, "application/json"
        return [
            route("/v1/load_lora_adapter", self.load, admin, LoadBody, TEXT),
            route("/v1/unload_lora_adapter", self.unload, publish, UnloadBody, TEXT),
            route("/load_lora_adapter", self.load_pinned, admin, LoadPinnedBody, json),
            route("/unload_lora_adapter", self.unload_listed, publish, UnloadBody, json),
        ]

    async def load(self, request: Request) -> Response:
        """Publish an adapter from a path, under a name that is new (vLLM)."""
        asked = await body.parse(request, LoadBody, self._max_body_bytes)
        await self._publish(request, asked.lora_name, asked.lora_path, asked.load_inplace)
        name = show(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Forget an adapter (vLLM)."""
        asked = await body.parse(request, UnloadBody, self._max_body_bytes)
        await self._adapters.delete(request.state.caller, asked.lora_name, None)
        name = show(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def load_pinned(self, request: Request) -> Response:
        """Publish an adapter from a path, and keep it in memory if so asked (SGLang)."""
        asked = await body.parse(request, LoadPinnedBody, self._max_body_bytes)
        caller = request.state.caller
        try:
            await self._publish(request, asked.lora_name, asked.lora_path, False)
            if asked.pinned:
                await self._adapters.set_pinned(caller, asked.lora_name, True)
        except LorinerError as error:
            return await self._listed(caller, error)
        return await self._listed(caller)

    async def unload_listed(self, request: Request) -> Response:
        """Forget an adapter, and list those that are left (SGLang)."""
        asked = await body.parse(request, UnloadBody, self._max_body_bytes)
        try:
            await self._adapters.delete(request.state.caller, asked.lora_name, None)
        except LorinerError as error:
            return await self._listed(request.state.caller, error)
        return await self._listed(request.state.caller)

    async def _publish(self, request: Request, name: str, path: str, in_place: bool) -> None:
        caller, expected = request.state.caller, None if in_place else ""
        try:
            async with self._adapters.upload(caller, PATIENCE_S) as folder:
                await self._adapters.publish_path(caller, folder, path, name, expected)
        except InvalidRequestError as error:
            if error.param != "path":
                raise
            raise AdapterNotFoundError(show(path), "lora_path") from None
        except AdapterConflictError:
            raise InvalidRequestError(
                f"The lora adapter '{show(name)}' has already been loaded.", "lora_name"
            ) from None

    async def _listed(self, caller: Caller, error: LorinerError | None = None) -> Response:
        """SGLang's answer: 400 for whatever the caller can mend."""
        loaded = {p.record.name: p.record.source for p in await self._adapters.all_of(caller)}
        answer = {
            "success": error is None,
            "error_message": "" if error is None else str(error),
            "loaded_adapters": loaded,
        }
        status = 200 if error is None else row_of(error).status
        return json_response(answer, 400 if 400 <= status < 500 else status)
