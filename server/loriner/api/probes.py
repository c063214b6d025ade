"""Probes and metrics: is the engine alive, may traffic come, who are you, how is it going.

Open to everyone but /metrics. Invariant: a probe never waits for the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from loriner import __version__
from loriner.api.access import Right
from loriner.api.auth import GuardedRoute, Told
from loriner.api.metrics import Metrics
from loriner.api.responses import json_response

if TYPE_CHECKING:
    from loriner.engine.service import Service


class Probes:
    """Handlers and routes for load balancers, orchestrators and Prometheus."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service = service
        self._metrics = metrics

    def routes(self) -> list[GuardedRoute]:
        is_open, state = Right.OPEN, Told(statuses=(200, 503))
        exposition = Told(media="text/plain")
        return [
            GuardedRoute("/health", self.health, right=is_open, methods=["GET"], told=state),
            GuardedRoute("/ready", self.ready, right=is_open, methods=["GET"], told=state),
            GuardedRoute("/ping", self.health, right=is_open, methods=["GET", "POST"], told=state),
            GuardedRoute("/version", self.version, right=is_open, methods=["GET"]),
            GuardedRoute(
                "/metrics", self.metrics, right=Right.METRICS, methods=["GET"], told=exposition
            ),
        ]

    async def health(self, request: Request) -> Response:
        return self._state(self._service.healthy)

    async def ready(self, request: Request) -> Response:
        return self._state(self._service.ready)

    async def version(self, request: Request) -> Response:
        return json_response({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        body, content_type = await self._metrics.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    def _state(self, is_well: bool) -> Response:
        state = {
            "state": self._service.state,
            "restarts": self._service.num_restarts,
            "model": self._service.model_name,
            "base_digest": self._service.base_digest,
            "version": __version__,
        }
        return json_response(state, 200 if is_well else 503)
