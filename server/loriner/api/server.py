"""Runs the app under uvicorn: limits on what a socket may send, one line when it listens, a drain
at SIGTERM.

The only file that knows uvicorn. Invariant: after the first SIGTERM or SIGINT readiness is 503
while the sockets still listen, running requests get `shutdown_s`, and the process ends with status
0; a second signal forces.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from loriner.api.app import build_app
from loriner.api.shared import JobSettings, share
from loriner.config import ServerConfig
from loriner.errors import ConfigError

if TYPE_CHECKING:
    from loriner.api.grpc_server import GrpcServer
    from loriner.engine.service import Service

MAX_HEAD_BYTES = 64 << 10  # request line and headers
KEEP_ALIVE_S = 75
LAST_WORDS_S = 1.0  # for slow readers, after the engine has drained

logger = logging.getLogger("loriner.server")


class Server(uvicorn.Server):
    """uvicorn with our start-up line and our way to stop."""

    def __init__(
        self,
        service: Service,
        config: ServerConfig,
        announce: Callable[[str], None],
        on_ready: Callable[[Server], Awaitable[None]] | None = None,
        job_settings: JobSettings | None = None,
    ) -> None:
        self._shared = share(service, config, job_settings)
        app = build_app(service, config, self._shared)
        self._training = app.state.training
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                http="h11",
                ws="none",
                proxy_headers=False,
                lifespan="on",
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                timeout_keep_alive=KEEP_ALIVE_S,
                log_config=None,
                access_log=False,
                server_header=False,
            )
        )
        self._service = service
        self._settings = config
        self._announce = announce
        self._on_ready = on_ready
        self._socket: socket.socket | None = None
        self.grpc: GrpcServer | None = None
        self._starting: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    @property
    def url(self) -> str:
        """Where the server listens; valid once it was announced."""
        assert self._socket is not None
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def bind(self) -> socket.socket:
        """Take the address before anything slow starts. Raises ConfigError when it is taken."""
        host, port = self._settings.host, self._settings.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host.strip("[]"), port))
        except OSError as error:
            self._socket.close()
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port "
                "(0: any free one)."
            ) from None
        return self._socket

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal. Raises ConfigError before anything is started, and what
        kept the engine from starting."""
        bound = sockets or [self.bind()]
        try:
            super().run(bound)
        except ConfigError:  # of a door that could not open
            for taken in bound:
                taken.close()
            raise
        if self._failure is not None:
            raise self._failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        started = time.monotonic()
        await self._start_grpc()
        await super().startup(sockets)
        self._announce(f"Loriner is listening on {self.url}")
        if self.grpc is not None:
            self._announce(f"gRPC is listening on {self.grpc.address}")
        self._starting = asyncio.create_task(self._await_engine(started))
        self._starting.add_done_callback(self._note_failure)

    async def _start_grpc(self) -> None:
        if self._settings.grpc_port is None:
            return
        from loriner.api.grpc_server import GrpcServer  # brings grpc, so only when asked for

        self.grpc = GrpcServer(self._shared)
        await self.grpc.start()

    def _note_failure(self, starting: asyncio.Task[None]) -> None:
        if not starting.cancelled() and (error := starting.exception()) is not None:
            self._failure, self.should_exit = error, True

    async def _await_engine(self, started: float) -> None:
        await self._service.wait_until_ready()
        self._announce(f"The engine is ready ({time.monotonic() - started:.1f} s).")
        self._training.start(self.url)
        if self._on_ready is not None:
            await self._on_ready(self)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._starting is not None:
            self._starting.cancel()
        deadline = time.monotonic() + self._settings.shutdown_s
        logger.info("draining: running requests have %.0f s", self._settings.shutdown_s)
        if self.grpc is not None:
            await self.grpc.say_stopping()
        await self._drain()
        # since Python 3.12 a closed server also waits for its connections, forced or not
        left_s = 0.0 if self.force_exit else deadline - time.monotonic()
        self.config.timeout_graceful_shutdown = math.ceil(
            min(max(left_s, LAST_WORDS_S), 5 * LAST_WORDS_S)
        )
        if self.grpc is not None:
            await self.grpc.stop(self.config.timeout_graceful_shutdown)
        await super().shutdown(sockets)

    async def _drain(self) -> None:
        """Stop the service while the sockets still listen: probes see 503, not a refusal."""
        stopping = asyncio.create_task(self._service.stop(self._settings.shutdown_s))
        while not stopping.done() and not self.force_exit:
            await asyncio.wait({stopping}, timeout=0.1)
        stopping.cancel()
        await asyncio.wait({stopping})
        if not stopping.cancelled():
            stopping.result()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
