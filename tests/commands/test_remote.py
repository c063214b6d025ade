"""What commands say to a server over real connections."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest

from loriner.commands import remote
from loriner.commands.remote import Remote

NUM_THREADS = 110  # a client has 100 connections
SLOW_S = 0.5


class Slow(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        time.sleep(SLOW_S)
        body = json.dumps({"path": self.path}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


class Server(ThreadingHTTPServer):
    request_queue_size = 2 * NUM_THREADS
    daemon_threads = True


@pytest.fixture
def url() -> Iterator[str]:
    server = Server(("127.0.0.1", 0), Slow)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_no_request_waits_for_another_s_connection(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", httpx.Timeout(30.0, pool=SLOW_S / 5))
    with Remote(url) as server, ThreadPoolExecutor(NUM_THREADS) as threads:
        paths = [f"/{i}" for i in range(2 * NUM_THREADS)]
        answers = list(threads.map(lambda path: server.call("GET", path), paths))

    assert [answer["path"] for answer in answers] == paths
