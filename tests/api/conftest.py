"""Fixtures of the doors: a fake service with three adapters, and clients in front of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from loriner.api.app import build_app
from loriner.config import ServerConfig
from tests.api.fake_service import FakeService
from tests.api.grpc_kit import Door, open_door
from tests.api.live import LiveServer

Client = Callable[..., TestClient]


@pytest.fixture
def service(tmp_path: Path) -> FakeService:
    return FakeService(tmp_path / "store", "pirate", "codeword", "acme/legal")


@pytest.fixture
def make_client(service: FakeService, tmp_path: Path) -> Iterator[Client]:
    """A factory: keyword arguments are fields of ServerConfig."""
    clients = []

    def make(**settings: Any) -> TestClient:
        settings.setdefault("store", tmp_path / "store")
        app = build_app(service, ServerConfig(**settings))
        clients.append(TestClient(app, base_url="http://localhost", raise_server_exceptions=False))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(make_client: Client) -> TestClient:
    return make_client()


@pytest.fixture
def live(service: FakeService, tmp_path: Path) -> Iterator[LiveServer]:
    """A real server on a free loopback port."""
    with LiveServer(service, ServerConfig(port=0, store=tmp_path / "store")) as server:
        yield server


@pytest.fixture
def make_door(service: FakeService, tmp_path: Path) -> Iterator[Callable[..., Door]]:
    """A factory of gRPC doors: keyword arguments are fields of ServerConfig."""
    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> Door:
            config = ServerConfig(port=0, grpc_port=0, store=tmp_path / "store", **settings)
            server = stack.enter_context(LiveServer(service, config)).server
            assert server.grpc is not None
            return stack.enter_context(open_door(f"127.0.0.1:{server.grpc.port}"))

        yield make


@pytest.fixture
def door(make_door: Callable[..., Door]) -> Door:
    return make_door()
