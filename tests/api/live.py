"""The real uvicorn server in a thread, on a free port: for what only sockets can show."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loriner.api.server import Server
from loriner.config import ServerConfig
from tests.api.fake_service import FakeService


class LiveServer:
    """`with LiveServer(service, config) as live: live.url`."""

    def __init__(self, service: Any, config: ServerConfig) -> None:
        self.lines: list[str] = []
        self.service = service
        self.server = Server(service, config, self.lines.append)
        self._thread = threading.Thread(target=self.server.run, daemon=True)

    @property
    def url(self) -> str:
        return self.server.url

    def __enter__(self) -> LiveServer:
        self._thread.start()
        wait_until(lambda: bool(self.lines))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.server.should_exit = True
        self.join()

    def stop(self) -> None:
        """What SIGTERM does."""
        self.server.handle_exit(15, None)

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


def shared_server(root: Path, **settings: Any) -> LiveServer:
    """For a module's tests: each begins with `service.renew`. `settings` are of ServerConfig."""
    config = ServerConfig(port=0, store=root, **settings)
    return LiveServer(FakeService(root / "store"), config)


def wait_until(is_true: Callable[[], bool], timeout_s: float = 5.0) -> float:
    """Seconds it took."""
    start = time.monotonic()
    while not is_true():
        assert time.monotonic() - start < timeout_s, "it did not happen"
        time.sleep(0.005)
    return time.monotonic() - start
