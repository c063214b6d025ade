"""The gRPC door to the server itself: Status and Drain."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

from grpc import aio

from loriner.api.shared import Shared
from loriner.api.standing import status_of
from loriner_proto.v1 import admin_pb2 as pb
from loriner_proto.v1 import admin_pb2_grpc

Context = aio.ServicerContext[Any, Any]


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """`on_drain` tells health before the answer goes out."""

    def __init__(self, shared: Shared, on_drain: Callable[[], Awaitable[None]]) -> None:
        self._service = shared.service
        self._on_drain = on_drain

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        return pb.StatusResponse(**dataclasses.asdict(status_of(self._service)))

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        num_open = self._service.drain()
        await self._on_drain()
        return pb.DrainResponse(num_open=num_open)
