"""Several servers behind one client: round robin over those that are healthy."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

import loriner_client as lc
from loriner.config import ServerConfig
from loriner_client._queries import Tokenize
from loriner_client._rpcs import CALLS
from tests.api.fake_service import FakeService
from tests.api.live import LiveServer, wait_until
from tests.client.kinds import address_of


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[LiveServer]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                LiveServer(
                    FakeService(tmp_path / name, "pirate"),
                    ServerConfig(port=0, grpc_port=0, store=tmp_path / name, shutdown_s=0.2),
                )
            )
            for name in "ab"
        ]


def counts(pair: list[LiveServer]) -> list[int]:
    return [len(server.service.calls) for server in pair]


def test_calls_are_spread_and_follow_health(pair: list[LiveServer]) -> None:
    with lc.Client([address_of("grpc", server) for server in pair]) as client:
        client.chat("hi")
        wait_until(lambda: bool(client.chat("hi")) and all(counts(pair)))
        before = counts(pair)
        for _ in range(10):
            client.chat("hi")
        assert [now - then for now, then in zip(counts(pair), before, strict=True)] == [5, 5]

        pair[0].service.state = "restarting"  # its health says so; it would still answer

        def only_the_other() -> bool:
            then = counts(pair)
            for _ in range(4):
                client.chat("hi")
            return counts(pair)[0] == then[0]

        wait_until(only_the_other)
        pair[0].service.state = "ready"
        then = counts(pair)
        wait_until(lambda: bool(client.chat("hi")) and counts(pair)[0] > then[0])


def test_a_server_that_goes_is_not_missed(pair: list[LiveServer]) -> None:
    with lc.Client([address_of("grpc", server) for server in pair]) as client:
        wait_until(lambda: bool(client.chat("hi")) and all(counts(pair)))
        pair[1].stop()
        for _ in range(20):
            assert client.chat("hi").text
        pair[1].join()
        for _ in range(5):
            assert client.chat("hi").text


def test_a_call_that_a_stopping_server_cancels_is_tried_again() -> None:
    """gRPC says CANCELLED for what had come in when a server stopped and was not begun."""
    rpc, seen = CALLS[Tokenize], []

    def answer(request: Any, context: Any) -> Any:
        seen.append(request)
        if len(seen) == 1:
            context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")
        return rpc.response(token_ids=[7])

    handler = grpc.unary_unary_rpc_method_handler(
        answer, lambda data: data, lambda message: message.SerializeToString()
    )
    service = rpc.path.split("/")[1]
    server = grpc.server(ThreadPoolExecutor(1))
    handlers = grpc.method_handlers_generic_handler(service, {rpc.method: handler})
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with lc.Client(f"127.0.0.1:{port}") as client:
            assert client.tokenize("hi") == (7,)
            assert len(seen) == 2
        with lc.Client(f"127.0.0.1:{port}", retry=lc.Retry(attempts=1)) as client:
            seen.clear()
            with pytest.raises(lc.TransportError, match="CANCELLED"):
                client.tokenize("hi")
    finally:
        server.stop(None)
