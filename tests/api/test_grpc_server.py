"""The gRPC door as a whole: health, reflection, drain, limits, TLS, and how it stops."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from loriner.api.grpc_server import SERVICES
from loriner.config import ServerConfig
from loriner.errors import ConfigError
from loriner_proto.v1 import admin_pb2, inference_pb2
from tests.api.fake_service import FakeService
from tests.api.grpc_kit import Door, chat, refused
from tests.api.live import LiveServer, wait_until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health_of(door: Door, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(door.channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status)


@pytest.mark.parametrize("name", ["", *SERVICES])
def test_health_follows_the_engine(door: Door, service: FakeService, name: str) -> None:
    assert health_of(door, name) == SERVING
    service.state = "restarting"
    wait_until(lambda: health_of(door, name) == NOT_SERVING)
    service.state = "ready"
    wait_until(lambda: health_of(door, name) == SERVING)


def test_reflection_names_every_service(door: Door) -> None:
    database = ProtoReflectionDescriptorDatabase(door.channel)
    file = database.FindFileContainingSymbol("loriner_proto.v1.InferenceService")

    assert set(database.get_services()) > {*SERVICES, "grpc.health.v1.Health"}
    assert file.name == inference_pb2.DESCRIPTOR.name


def test_status_tells_what_is_served(door: Door) -> None:
    status = door.admin.Status(admin_pb2.StatusRequest())

    assert (status.state, status.model, status.max_model_len) == ("ready", "tiny", 512)
    assert (status.num_blocks, status.num_free_blocks) == (10, 4)


def test_a_drain_refuses_what_is_new_and_lets_the_rest_finish(
    door: Door, service: FakeService
) -> None:
    service.delay_s = 0.05
    stream = iter(
        door.inference.StreamChat(inference_pb2.StreamChatRequest(chat=chat()), timeout=20)
    )
    next(stream)
    assert door.admin.Drain(admin_pb2.DrainRequest()).num_open == 1
    assert health_of(door) == NOT_SERVING
    late = refused(lambda: door.inference.Chat(chat()))

    assert (late.code, late.reason) == ("UNAVAILABLE", "ENGINE_UNAVAILABLE")
    assert list(stream)[-1].HasField("usage")


def test_at_a_signal_streams_finish_and_health_says_so_first(
    service: FakeService, tmp_path: Path
) -> None:
    service.delay_s = 0.1
    config = ServerConfig(port=0, grpc_port=0, store=tmp_path, shutdown_s=20)
    with LiveServer(service, config) as live:
        assert live.server.grpc is not None
        with grpc.insecure_channel(live.server.grpc.address) as channel:
            door = Door(channel)
            stream = iter(
                door.inference.StreamChat(inference_pb2.StreamChatRequest(chat=chat()), timeout=20)
            )
            next(stream)
            live.stop()
            wait_until(lambda: health_of(door) == NOT_SERVING)
            assert list(stream)[-1].HasField("usage")
        live.join()


def test_a_call_that_hangs_does_not_keep_the_server(service: FakeService, tmp_path: Path) -> None:
    service.hold = asyncio.Event()
    config = ServerConfig(port=0, grpc_port=0, store=tmp_path, shutdown_s=0.1)
    with LiveServer(service, config) as live:
        assert live.server.grpc is not None
        with grpc.insecure_channel(live.server.grpc.address) as channel:
            call = Door(channel).inference.Chat.future(chat())
            wait_until(lambda: len(service.open) == 1)
            live.stop()
            live.join()
            assert call.exception(timeout=5) is not None


def test_a_message_above_the_limit_is_refused(make_door: Callable[..., Door]) -> None:
    door = make_door(max_body_bytes=1 << 20)
    with pytest.raises(grpc.RpcError) as caught:
        door.inference.Chat(chat("x" * (3 << 20)))

    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
    assert door.inference.Chat(chat()).choices


def test_without_a_port_there_is_no_grpc_door(service: FakeService, tmp_path: Path) -> None:
    with LiveServer(service, ServerConfig(port=0, store=tmp_path)) as live:
        assert live.server.grpc is None


def test_a_port_that_is_taken_is_a_clear_error(
    door: Door, service: FakeService, tmp_path: Path
) -> None:
    port = int(door.channel._channel.target().decode().rpartition(":")[2])  # type: ignore[attr-defined]
    server = LiveServer(service, ServerConfig(port=0, grpc_port=port, store=tmp_path)).server
    caught: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except ConfigError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert "--grpc-port" in str(caught[0])


CERT = "-newkey rsa:2048 -nodes -subj /CN=localhost -days 2 -addext subjectAltName=DNS:localhost"


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two self-signed certificates: the server's and a client's, each its own authority."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certs")
    for name in ("server", "client"):
        out = ["-keyout", f"{name}.key", "-out", f"{name}.pem"]
        command = ["openssl", "req", "-x509", *CERT.split(), *out]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    yield folder


def asks(live: LiveServer, credentials: grpc.ChannelCredentials) -> str:
    assert live.server.grpc is not None
    with grpc.secure_channel(f"localhost:{live.server.grpc.port}", credentials) as channel:
        return Door(channel).inference.Chat(chat(), timeout=10).choices[0].text


def tls(certs: Path, tmp_path: Path, **more: Path) -> ServerConfig:
    pair = {"grpc_cert": certs / "server.pem", "grpc_key": certs / "server.key"}
    return ServerConfig(port=0, grpc_port=0, store=tmp_path, **pair, **more)


def test_with_a_certificate_the_door_speaks_tls(
    service: FakeService, certs: Path, tmp_path: Path
) -> None:
    root = (certs / "server.pem").read_bytes()
    with LiveServer(service, tls(certs, tmp_path)) as live:
        assert asks(live, grpc.ssl_channel_credentials(root))
        with pytest.raises(grpc.RpcError):
            asks(live, grpc.ssl_channel_credentials((certs / "client.pem").read_bytes()))


def test_with_an_authority_only_its_clients_come_in(
    service: FakeService, certs: Path, tmp_path: Path
) -> None:
    root, key, chain = (
        (certs / name).read_bytes() for name in ("server.pem", "client.key", "client.pem")
    )
    with LiveServer(service, tls(certs, tmp_path, grpc_client_ca=certs / "client.pem")) as live:
        assert asks(live, grpc.ssl_channel_credentials(root, key, chain))
        with pytest.raises(grpc.RpcError):
            asks(live, grpc.ssl_channel_credentials(root))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"grpc_cert": Path("x")}, "go together"),
        ({"grpc_client_ca": Path("x")}, "needs grpc_cert"),
        ({"grpc_port": 70000}, "grpc_port must be at most"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Path], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServerConfig(**settings)


@pytest.mark.parametrize("missing", ["grpc_cert", "grpc_client_ca"])
def test_tls_files_that_are_not_pem_are_named(
    service: FakeService, certs: Path, tmp_path: Path, missing: str
) -> None:
    (tmp_path / "bad").write_text("no certificate")
    pair = {"grpc_cert": certs / "server.pem", "grpc_key": certs / "server.key"}
    settings = {**pair, missing: tmp_path / "bad"}
    server = LiveServer(service, ServerConfig(port=0, grpc_port=0, store=tmp_path, **settings))
    caught: list[BaseException] = []

    def run() -> None:
        try:
            server.server.run()
        except ConfigError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert missing in str(caught[0])
