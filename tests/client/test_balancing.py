"""Several servers behind one client: round robin over those that are healthy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import loriner_client as lc
from loriner.config import ServerConfig
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
