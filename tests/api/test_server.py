"""The server's life: where it listens, how it drains, what a second signal does."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from loriner.api.server import Server
from loriner.config import ServerConfig
from loriner.errors import ConfigError, EngineUnavailableError
from tests.api.fake_service import FakeService
from tests.api.live import LiveServer, wait_until

HI = {"messages": [{"role": "user", "content": "hi"}]}


def request(live: LiveServer, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=10)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


class Asking(threading.Thread):
    """A request in another thread."""

    def __init__(self, live: LiveServer, body: Any) -> None:
        super().__init__(daemon=True)
        self._live, self._body = live, body
        self.answer: tuple[int, bytes] = (0, b"")
        self.start()

    def run(self) -> None:
        self.answer = request(self._live, "POST", "/v1/chat/completions", self._body)


def test_a_free_port_is_found_and_announced(live: LiveServer) -> None:
    assert live.lines[0] == f"Loriner is listening on {live.url}"
    assert live.url.startswith("http://127.0.0.1:")
    assert request(live, "GET", "/health")[0] == 200


def test_it_says_when_the_engine_is_ready(live: LiveServer) -> None:
    wait_until(lambda: len(live.lines) == 2)
    assert "ready" in live.lines[1]


def test_a_taken_port_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ServerConfig(port=taken.getsockname()[1], store=tmp_path)
        with pytest.raises(ConfigError, match="--port"):
            Server(FakeService(tmp_path), config, print).run()  # type: ignore[arg-type]


@pytest.mark.parametrize("is_stream", [False, True])
def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(
    live: LiveServer, service: FakeService, is_stream: bool
) -> None:
    service.delay_s = 0.1
    asking = Asking(live, {**HI, "stream": is_stream})
    wait_until(lambda: bool(service.open))
    live.stop()

    assert wait_until(lambda: service.state == "draining") < 0.2
    assert request(live, "GET", "/ready")[0] == 503
    assert request(live, "POST", "/v1/chat/completions", HI)[0] == 503
    asking.join(5)
    assert asking.answer[0] == 200
    assert b"you" in asking.answer[1]
    live.join()


def test_a_request_that_outlives_the_grace_does_not_hold_the_server(
    service: FakeService, tmp_path: Path
) -> None:
    service.delay_s = 30
    with LiveServer(service, ServerConfig(port=0, store=tmp_path, shutdown_s=0.2)) as live:
        Asking(live, HI)
        wait_until(lambda: bool(service.open))
        start = time.monotonic()
        live.stop()
        live.join()

        assert time.monotonic() - start < 3
    assert len(service.closed) == 1


def test_a_second_signal_forces(service: FakeService, tmp_path: Path) -> None:
    service.delay_s = 30
    with LiveServer(service, ServerConfig(port=0, store=tmp_path, shutdown_s=60)) as live:
        Asking(live, HI)
        wait_until(lambda: bool(service.open))
        live.stop()
        live.stop()
        start = time.monotonic()
        live.join()

        assert time.monotonic() - start < 3


def test_an_engine_that_cannot_start_ends_the_server_with_its_reason(
    service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise EngineUnavailableError("no memory for the base")

    monkeypatch.setattr(service, "wait_until_ready", fail)
    server = Server(service, ServerConfig(port=0, store=tmp_path), lambda line: None)  # type: ignore[arg-type]

    with pytest.raises(EngineUnavailableError, match="no memory"):
        server.run()
