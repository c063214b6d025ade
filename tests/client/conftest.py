"""A live server with both doors, and clients of every kind in front of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loriner.config import ServerConfig
from tests.api.fake_service import FakeService
from tests.api.live import LiveServer
from tests.client.kinds import KINDS, open_client

Open = Callable[..., Any]


@pytest.fixture
def service(tmp_path: Path) -> FakeService:
    return FakeService(tmp_path / "store", "pirate", "codeword", "acme/legal")


@pytest.fixture
def live(service: FakeService, tmp_path: Path) -> Iterator[LiveServer]:
    config = ServerConfig(port=0, grpc_port=0, store=tmp_path / "store", max_upload_bytes=1 << 22)
    with LiveServer(service, config) as server:
        yield server


@pytest.fixture(params=KINDS)
def client(request: pytest.FixtureRequest, live: LiveServer) -> Iterator[Any]:
    """Sync or async, gRPC or HTTP; always called as the sync one is."""
    with open_client(request.param, live) as client:
        yield client
