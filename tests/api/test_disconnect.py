"""What only sockets show: clients that leave, uploads that stop, heads that are too long."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from loriner.api import upload
from tests.api.fake_service import FakeService
from tests.api.live import LiveServer, shared_server, wait_until

FREED_S = 0.5
HI = {"messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, object]] = {
    "/v1/chat/completions": HI,
    "/v1/completions": {"prompt": ["a", "b"]},
    "/v1/responses": {"input": "hi"},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with shared_server(tmp_path_factory.mktemp("shared")) as server:
        yield server


@pytest.fixture
def live(shared: LiveServer) -> LiveServer:
    """One server for the whole module, its service as new for each test."""
    shared.service.renew()
    return shared


@pytest.fixture
def service(live: LiveServer) -> FakeService:
    assert isinstance(live.service, FakeService)
    return live.service


@contextmanager
def connection(live: LiveServer) -> Iterator[socket.socket]:
    port = int(live.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        yield sock


def head(path: str, length: int, content_type: str = "application/json") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def send(sock: socket.socket, path: str, body: dict[str, object]) -> None:
    data = json.dumps(body).encode()
    sock.sendall(head(path, len(data)) + data)


def hang_up(sock: socket.socket, with_reset: bool) -> None:
    if with_reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_leaving_before_the_first_token_closes_the_generation(
    live: LiveServer, service: FakeService, path: str, is_stream: bool, with_reset: bool
) -> None:
    service.hold = asyncio.Event()
    with connection(live) as sock:
        send(sock, path, {**BODIES[path], "stream": is_stream})
        expected = 2 if path == "/v1/completions" else 1
        wait_until(lambda: len(service.open) == expected)
        assert service.closed == []
        hang_up(sock, with_reset)

        assert wait_until(lambda: len(service.closed) == expected) < FREED_S


@pytest.mark.parametrize("is_stream", [False, True])
def test_leaving_in_the_middle_closes_the_generation(
    live: LiveServer, service: FakeService, is_stream: bool
) -> None:
    service.delay_s = 0.2
    with connection(live) as sock:
        send(sock, "/v1/chat/completions", {**HI, "stream": is_stream})
        wait_until(lambda: bool(service.open) and service.open[0].position == 2)
        hang_up(sock, with_reset=False)

        assert wait_until(lambda: len(service.closed) == 1) < FREED_S
    assert service.open[0].position < 6


def test_leaving_disturbs_nobody_else(live: LiveServer, service: FakeService) -> None:
    service.delay_s = 0.02
    with connection(live) as stays, connection(live) as leaves:
        for sock in (stays, leaves):
            send(sock, "/v1/chat/completions", HI)
        wait_until(lambda: len(service.open) == 2)
        hang_up(leaves, with_reset=True)

        assert stays.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_finished_request_is_closed_once_and_the_connection_kept(
    live: LiveServer, service: FakeService
) -> None:
    with connection(live) as sock:
        for count in (1, 2):
            send(sock, "/v1/chat/completions", HI)
            answer = b""
            while not answer.endswith(b"}"):
                answer += sock.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
            assert len(service.closed) == count


def test_an_upload_whose_sender_leaves_leaves_nothing(
    live: LiveServer, service: FakeService
) -> None:
    start = (
        b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nnew\r\n--b\r\n'
        b'Content-Disposition: form-data; name="adapter_model.safetensors"; filename="x"\r\n\r\n'
    )
    with connection(live) as sock:
        sock.sendall(head("/admin/adapters", 10_000_000, "multipart/form-data; boundary=b"))
        sock.sendall(start + b"x" * 3_000_000)
        wait_until(lambda: any(service.store.root.rglob("adapter_model.safetensors")))
        hang_up(sock, with_reset=True)

        wait_until(lambda: not any(service.store.root.iterdir()))
    assert service.store.published == []


def test_a_large_upload_is_written_in_pieces(
    live: LiveServer, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    feed = upload.PartReader.feed

    def measured(self: upload.PartReader, data: bytes) -> None:
        sizes.append(len(data))
        feed(self, data)

    monkeypatch.setattr(upload.PartReader, "feed", measured)
    weights = os.urandom(6 << 20)
    body = (
        b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nnew\r\n--b\r\n'
        b'Content-Disposition: form-data; name="adapter_config.json"; filename="x"\r\n\r\n{}\r\n'
        b'--b\r\nContent-Disposition: form-data; name="adapter_model.safetensors"; filename="x"'
        b"\r\n\r\n" + weights + b"\r\n--b--\r\n"
    )
    with connection(live) as sock:
        sock.sendall(head("/admin/adapters", len(body), "multipart/form-data; boundary=b") + body)
        assert sock.recv(65536).startswith(b"HTTP/1.1 201")

    assert service.store.published[0]["adapter_model.safetensors"] == weights
    assert max(sizes) < 2 << 20


def test_an_endless_head_is_refused(live: LiveServer) -> None:
    with connection(live) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(100_000):
                sock.sendall(b"X-A: " + b"y" * 1000 + b"\r\n")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET http://evil@localhost/health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET /health\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
        b"Content-Length: 2\r\n\r\nab",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\r\n\r\n\r\nnonsense\r\n\r\n",
    ],
)
def test_malformed_http_is_refused(live: LiveServer, request_bytes: bytes) -> None:
    with connection(live) as sock:
        sock.sendall(request_bytes)
        status = sock.recv(65536).split(b" ")[1]

    assert status in (b"400", b"403", b"404")
