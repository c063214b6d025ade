"""The HTTP application as data: routes, middleware, error handlers, lifespan.

Knows every door and nothing of sockets (`server.py`). Invariant: each response carries the
request's id, and each error, whoever raised it, has OpenAI's body.
"""

from __future__ import annotations

import contextlib
import logging
import re
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loriner.api.admin import AdminDoor
from loriner.api.auth import Guard
from loriner.api.embeddings import EmbeddingDoor
from loriner.api.fine_tuning import FineTuningDoor
from loriner.api.keys import KeyDoor
from loriner.api.metrics import CLIENT_CLOSED, Metrics
from loriner.api.openai import OpenAIDoor
from loriner.api.openapi import Document
from loriner.api.other_servers import OtherServers
from loriner.api.probes import Probes
from loriner.api.responses import error_response, http_error_response
from loriner.api.shared import Shared, share
from loriner.api.status import row_of
from loriner.api.tokens import TokenDoor
from loriner.config import ServerConfig
from loriner.errors import LorinerError

if TYPE_CHECKING:
    from loriner.engine.service import Service

logger = logging.getLogger("loriner.api")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


def build_app(service: Service, config: ServerConfig, shared: Shared | None = None) -> Starlette:
    """The whole HTTP door. Raises ConfigError when `config` would serve a network without a key."""
    shared = shared or share(service, config)
    metrics = shared.metrics
    training = FineTuningDoor(shared)
    routes = [
        *OpenAIDoor(shared).routes(),
        *EmbeddingDoor(shared).routes(),
        *TokenDoor(shared).routes(),
        *AdminDoor(shared).routes(),
        *KeyDoor(shared).routes(),
        *OtherServers(shared).routes(),
        *training.routes(),
        *Probes(service, metrics).routes(),
    ]
    routes += Document(routes).routes
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(RequestContext, metrics=metrics),
            Middleware(Guard, routes=routes, access=shared.access, host=config.host),
        ],
        exception_handlers={
            LorinerError: _answer_error,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_disconnect,
            Exception: _answer_error,
        },
        lifespan=lambda app: _lifespan(service, config, training),
    )
    app.router.redirect_slashes = False
    app.state.training = training
    return app


@contextlib.asynccontextmanager
async def _lifespan(
    service: Service, config: ServerConfig, training: FineTuningDoor
) -> AsyncIterator[None]:
    await service.start()
    try:
        yield
    finally:
        await training.stop()
        await service.stop(config.shutdown_s)


class RequestContext:
    """ASGI middleware: gives each request its id, echoes it, and counts the response."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                ]
                route, status = state.get("route", "unmatched"), str(message["status"])
                self._metrics.responses.labels(route, status).inc()
            await send(message)

        await self._app(scope, receive, send_with_id)


def _request_id(scope: Scope) -> str:
    """The caller's x-request-id when it is short and plain, else a new one."""
    for name, value in scope["headers"]:
        text = value.decode("latin-1")
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(text):
            return str(text)
    return f"req_{uuid.uuid4().hex}"


async def _answer_error(request: Request, error: Exception) -> Response:
    request_id = request.state.request_id
    status = row_of(error).status
    if status >= 500:
        level = logging.WARNING if status == 503 else logging.ERROR
        logger.log(level, "request %s: %d: %r", request_id, status, error)
    response = error_response(error, request_id)
    if not isinstance(error, LorinerError):
        # Sent from outside RequestContext, which therefore cannot add the id.
        response.headers["x-request-id"] = request_id
    return response


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = f"Unknown request URL: {request.method} {_shown_path(request)}."
    elif error.status_code == 405:
        message = f"{request.method} is not allowed here."
    return http_error_response(error.status_code, message, error.headers)


async def _answer_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


def _shown_path(request: Request) -> str:
    return ascii(request.scope["path"][:200])[1:-1]
