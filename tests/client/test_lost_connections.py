"""Connections over HTTP that a server closes without an answer, as one does that stops."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import loriner_client as lc
from tests.client.kinds import open_client

SOON = {"first_s": 0.01, "longest_s": 0.01}


class Closing:
    """Answers as /tokenize does, whatever is asked; closes instead where `closes` says so."""

    def __init__(self) -> None:
        self.closes: list[bool] = []  # of the requests to come; then none
        self.paths: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as file:
                while self._serve(connection, file):
                    pass

    def _serve(self, connection: socket.socket, file: Any) -> bool:
        """One request; whether the connection stays."""
        head = file.readline().decode().split()
        length = 0
        while (line := file.readline().strip()) != b"":
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        if not head:
            return False
        file.read(length)
        self.paths.append(head[1])
        if self.closes and self.closes.pop(0):
            return False
        body = json.dumps({"tokens": [7]}).encode()
        connection.sendall(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        return True

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def server() -> Iterator[Closing]:
    made = Closing()
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["http", "async http"])
@pytest.mark.parametrize("is_kept_alive", [False, True])
def test_what_is_safe_to_repeat_is_asked_again(
    server: Closing, kind: str, is_kept_alive: bool
) -> None:
    live: Any = server
    with open_client(kind, live, retry=lc.Retry(3, **SOON)) as client:
        if is_kept_alive:
            assert client.tokenize("hi") == (7,)
        server.closes, server.paths = [True, True], []
        assert client.tokenize("hi") == (7,)
        assert len(server.paths) == 3


@pytest.mark.parametrize("kind", ["http", "async http"])
def test_it_is_asked_no_more_than_was_said(server: Closing, kind: str) -> None:
    live: Any = server
    server.closes = [True] * 9
    with (
        open_client(kind, live, retry=lc.Retry(2, **SOON)) as client,
        pytest.raises(lc.TransportError, match="disconnected"),
    ):
        client.tokenize("hi")
    assert len(server.paths) == 2


@pytest.mark.parametrize("kind", ["http", "async http"])
def test_what_changes_something_is_not_asked_again(server: Closing, kind: str) -> None:
    live: Any = server
    server.closes = [True]
    with open_client(kind, live, retry=lc.Retry(3, **SOON)) as client:
        with pytest.raises(lc.TransportError):
            client.adapters.alias("prod", "a")
        assert len(server.paths) == 1
