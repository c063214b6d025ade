"""The guard in front of every HTTP route: finds the right that the route needs, asks `access`.

Decides on the matched route of `scope["path"]`, never on a URL rebuilt from headers. Invariant: a
path without a route of its own still needs a key, whatever the method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from loriner.api.access import Access, Right, bearer
from loriner.api.responses import error_response
from loriner.errors import LorinerError, PermissionDeniedError


@dataclass(frozen=True, slots=True)
class Told:
    """What the OpenAPI document tells of a route besides its path and its right."""

    body: type[BaseModel] | None = None
    form: tuple[str, ...] = ()  # fields of multipart/form-data, the required one first
    files: tuple[str, ...] = ()  # of those
    answer: type | None = None  # None: some object
    statuses: tuple[int, ...] = (200,)
    media: str = "application/json"
    streams: bool = False


NOTHING = Told()


class GuardedRoute(Route):
    """A route that states the right it needs; there is no default."""

    def __init__(
        self,
        path: str,
        endpoint: Callable[..., Any],
        *,
        right: Right,
        methods: Sequence[str],
        told: Told = NOTHING,
    ) -> None:
        super().__init__(path, endpoint, methods=list(methods))
        self.right, self.told = right, told


class Guard:
    """ASGI middleware: lets a request through to the routes, or answers 401 or 403."""

    def __init__(
        self, app: ASGIApp, *, routes: Sequence[GuardedRoute], access: Access, host: str
    ) -> None:
        self._app = app
        self._routes = tuple(routes)
        self._access = access
        self._hosts = {"localhost", "127.0.0.1", "::1", host.strip("[]").lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            self._authorise(scope)
        except LorinerError as error:
            response = error_response(error, scope["state"]["request_id"])
            return await response(scope, receive, send)
        await self._app(scope, receive, send)

    def _authorise(self, scope: Scope) -> None:
        route = self._match(scope)
        right = Right.KNOWN if route is None else route.right
        scope["state"]["route"] = "unmatched" if route is None else route.path
        headers = Headers(scope=scope)
        scope["state"]["caller"] = self._access.admit(
            right, bearer(headers.getlist("authorization"))
        )
        if right is not Right.OPEN and not self._access.needs_key(right):
            self._check_local(headers)

    def _match(self, scope: Scope) -> GuardedRoute | None:
        partial = None
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return route
            if match is Match.PARTIAL and partial is None:
                partial = route
        return partial

    def _check_local(self, headers: Headers) -> None:
        """Without keys a web page must not reach us through the user's browser (DNS rebinding)."""
        if _host_name(headers.get("host", "")) not in self._hosts:
            raise PermissionDeniedError("Without an API key only local Host names are served.")
        origin = headers.get("origin")
        if origin is not None and _origin_name(origin) not in self._hosts:
            raise PermissionDeniedError("Without an API key requests from other sites are refused.")


def _host_name(host: str) -> str:
    name = host[: host.find("]")] if host.startswith("[") else host.partition(":")[0]
    return name.strip("[").lower()


def _origin_name(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""
