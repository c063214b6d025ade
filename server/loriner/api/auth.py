"""Who may call what: the right each route needs, the keys, and the guard in front of every route.

Knows nothing of tenants yet. Decides on the matched route of `scope["path"]`, never on a URL
rebuilt from headers. Invariant: a path without a route of its own still needs a key, whatever the
method.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from loriner.api.status import error_response
from loriner.config import ServerConfig
from loriner.errors import AuthenticationError, ConfigError, LorinerError, PermissionDeniedError


class Right(enum.Enum):
    """What a caller must be allowed to do."""

    OPEN = "open"  # probes
    INFER = "infer"
    ADMIN = "admin"


class GuardedRoute(Route):
    """A route that states the right it needs; there is no default."""

    def __init__(
        self, path: str, endpoint: Callable[..., Any], *, right: Right, methods: Sequence[str]
    ) -> None:
        super().__init__(path, endpoint, methods=list(methods))
        self.right = right


def check_binding(config: ServerConfig) -> None:
    """Raises ConfigError when the server would listen to the network without a key."""
    if not config.api_key and not is_loopback(config.host):
        raise ConfigError(
            f"host {config.host!r} can be reached by others and no key is configured: set api_key "
            "(LORINER_API_KEY), or listen on 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Keys:
    """The configured keys, as digests. `admin_key` defaults to `api_key`."""

    def __init__(self, api_key: str, admin_key: str) -> None:
        self._infer = _digest(api_key) if api_key else None
        self._admin = _digest(admin_key or api_key) if admin_key or api_key else None

    def needed_for(self, right: Right) -> bool:
        configured = {Right.OPEN: None, Right.INFER: self._infer, Right.ADMIN: self._admin}
        return configured[right] is not None

    def check(self, right: Right, token: str | None) -> None:
        """Raises AuthenticationError or PermissionDeniedError. Compares every key, always."""
        if token is None:
            raise AuthenticationError(
                "You didn't provide an API key. Send it in an Authorization header: "
                "`Authorization: Bearer YOUR_KEY`."
            )
        given = _digest(token)
        is_infer = hmac.compare_digest(given, self._infer or b"")
        is_admin = hmac.compare_digest(given, self._admin or b"")
        if not (is_infer or is_admin):
            raise AuthenticationError("Incorrect API key provided.")
        if right is Right.ADMIN and not is_admin:
            raise PermissionDeniedError("This API key may not use the admin endpoints.")


class Guard:
    """ASGI middleware: lets a request through to the routes, or answers 401 or 403."""

    def __init__(
        self, app: ASGIApp, *, routes: Sequence[GuardedRoute], keys: Keys, host: str
    ) -> None:
        self._app = app
        self._routes = tuple(routes)
        self._keys = keys
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
        right = Right.INFER if route is None else route.right
        scope["state"]["route"] = "unmatched" if route is None else route.path
        scope["state"]["tenant"] = "default"
        if right is Right.OPEN:
            return
        headers = Headers(scope=scope)
        if self._keys.needed_for(right):
            self._keys.check(right, _bearer(headers))
        else:
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


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _bearer(headers: Headers) -> str | None:
    values = headers.getlist("authorization")
    scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _host_name(host: str) -> str:
    name = host[: host.find("]")] if host.startswith("[") else host.partition(":")[0]
    return name.strip("[").lower()


def _origin_name(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""
