"""Runs the gRPC door beside the HTTP door, on the same loop: address, TLS, limits, health, stop.

Invariant: health says SERVING only while `service.ready` does, and NOT_SERVING before a drain
begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loriner.api.grpc_adapters import MAX_CHUNK_BYTES, AdapterServicer
from loriner.api.grpc_admin import AdminServicer
from loriner.api.grpc_guard import Guard
from loriner.api.grpc_inference import InferenceServicer
from loriner.api.shared import Shared
from loriner.config import ServerConfig
from loriner.errors import ConfigError
from loriner_proto.v1 import adapters_pb2_grpc, admin_pb2_grpc, inference_pb2_grpc

SERVICES = tuple(
    f"loriner_proto.v1.{name}" for name in ("InferenceService", "AdapterService", "AdminService")
)
MAX_METADATA_BYTES = 64 << 10
MAX_STREAMS = 1024  # of one connection
KEEPALIVE_MS = 60_000  # our pings on a quiet connection
KEEPALIVE_TIMEOUT_MS = 20_000
MIN_PING_INTERVAL_MS = 10_000  # of a client's; one that pings more often is cut off
HEALTH_INTERVAL_S = 0.1


class GrpcServer:
    """`await start()`, then `address`; `await stop(grace)` after the service has drained."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._config = shared.config
        self._health = health.aio.HealthServicer()
        self._is_serving: bool | None = None
        self._is_stopping = False
        self.port = 0

    @property
    def address(self) -> str:
        host = self._config.host
        return f"[{host}]:{self.port}" if ":" in host.strip("[]") else f"{host}:{self.port}"

    async def start(self) -> None:
        """Listen and answer. Raises ConfigError when the address or a TLS file cannot be used."""
        self._server = aio.server(
            interceptors=(Guard(self._shared.access, self._shared.metrics),),
            options=_options(self._config),
        )
        self._add_services()
        credentials = _credentials(self._config)
        host = self._config.host.strip("[]")
        asked = f"{f'[{host}]' if ':' in host else host}:{self._config.grpc_port}"
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(asked)
            else:
                self.port = self._server.add_secure_port(asked, credentials)
        except RuntimeError:
            raise ConfigError(
                f"cannot listen on {asked} for gRPC; choose another --grpc-port (0: any free one)."
            ) from None
        await self.refresh()
        await self._server.start()
        self._watching = asyncio.create_task(self._watch())

    async def stop(self, grace_s: float | None) -> None:
        """Refuse new calls, give running ones `grace_s` seconds, then cancel them."""
        self._watching.cancel()
        await asyncio.wait({self._watching})
        await self._server.stop(grace_s)

    async def say_stopping(self) -> None:
        """Health is NOT_SERVING from now on; calls are still taken."""
        self._is_stopping = True
        await self.refresh()

    async def refresh(self) -> None:
        """Tell health watchers what is so now."""
        is_serving = self._shared.service.ready and not self._is_stopping
        if is_serving is self._is_serving:
            return
        self._is_serving = is_serving
        answer = health_pb2.HealthCheckResponse
        for name in ("", *SERVICES):
            await self._health.set(name, answer.SERVING if is_serving else answer.NOT_SERVING)

    def _add_services(self) -> None:
        shared, server = self._shared, self._server
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(shared), server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterServicer(shared), server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminServicer(shared, self.refresh), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_INTERVAL_S)
            await self.refresh()


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
        ("grpc.max_receive_message_length", config.max_body_bytes + MAX_CHUNK_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.http2.max_ping_strikes", 2),
    ]


def _credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """None without TLS. Raises ConfigError naming the setting."""
    if config.grpc_cert is None or config.grpc_key is None:
        return None
    try:
        ssl.create_default_context().load_cert_chain(config.grpc_cert, config.grpc_key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"grpc_cert, grpc_key: {error}.") from None
    pair = (_read("grpc_key", config.grpc_key), _read("grpc_cert", config.grpc_cert))
    if config.grpc_client_ca is None:
        return grpc.ssl_server_credentials([pair])
    authorities = _read("grpc_client_ca", config.grpc_client_ca)
    with contextlib.suppress(ssl.SSLError, ValueError):
        ssl.create_default_context(cadata=authorities.decode("ascii", "replace"))
        return grpc.ssl_server_credentials([pair], authorities, require_client_auth=True)
    raise ConfigError(f"grpc_client_ca: {config.grpc_client_ca} holds no PEM certificate.")


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: {error}.") from None
