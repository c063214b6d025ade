"""The gRPC door to the server itself: Status and Drain."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from grpc import aio

from loriner import __version__
from loriner.api.shared import Shared
from loriner_proto.v1 import admin_pb2 as pb
from loriner_proto.v1 import admin_pb2_grpc

Context = aio.ServicerContext[Any, Any]


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """`on_drain` tells health before the answer goes out."""

    def __init__(self, shared: Shared, on_drain: Callable[[], Awaitable[None]]) -> None:
        self._service = shared.service
        self._on_drain = on_drain

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        service, stats = self._service, self._service.stats()
        return pb.StatusResponse(
            state=service.state,
            num_restarts=service.num_restarts,
            model=service.model_name,
            base_digest=service.base_digest,
            version=__version__,
            max_model_len=service.max_model_len,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_blocks=stats.num_blocks,
            num_free_blocks=stats.num_free_blocks,
            pool_bytes=stats.pool_bytes,
            pool_used_bytes=stats.pool_used_bytes,
            host_bytes=stats.host_bytes,
            host_used_bytes=stats.host_used_bytes,
        )

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        num_open = self._service.drain()
        await self._on_drain()
        return pb.DrainResponse(num_open=num_open)
