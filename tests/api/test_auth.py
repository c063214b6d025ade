"""Keys and rights: every route, every method, every kind of caller."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from loriner.api.access import is_loopback
from loriner.api.app import build_app
from loriner.config import ServerConfig
from loriner.errors import ConfigError
from tests.api.conftest import Client
from tests.api.fake_service import FakeService

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
OPEN = ("/health", "/ready", "/ping", "/version", "/openapi.json")
INFER = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/pirate",
    "/metrics",
    "/tokenize",
    "/v1/tokenize",
    "/detokenize",
    "/v1/detokenize",
)
ADMIN = (
    "/admin/adapters",
    "/admin/adapters/pirate",
    "/admin/adapters/acme/legal",
    "/admin/adapters/pirate/pin",
    "/admin/adapters/pirate/unpin",
    "/admin/adapters/pirate/evict",
    "/admin/aliases/x",
    "/admin/status",
    "/admin/drain",
    "/admin/keys",
    "/admin/keys/0123",
    "/admin/tenants/acme/quota",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/load_lora_adapter",
    "/unload_lora_adapter",
)
NOWHERE = ("/", "/v1", "/admin", "/nope", "//admin/adapters", "/admin/../v1/models", "/V1/models")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def keyed(make_client: Client) -> TestClient:
    return make_client(host="0.0.0.0", api_key="user-key", admin_key="admin-key")


@pytest.mark.parametrize("path", INFER + ADMIN + NOWHERE)
def test_without_a_known_key_every_method_of_every_route_is_401(
    keyed: TestClient, path: str
) -> None:
    keys = (None, "wrong", "", "Admin-key", "user-keyy")
    for method, key in itertools.product(METHODS, keys):
        headers = {} if key is None else bearer(key)
        response = keyed.request(method, path, headers=headers)

        assert response.status_code == 401, (method, key)
        if method != "HEAD":
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ADMIN)
def test_the_user_key_may_not_administer(
    keyed: TestClient, service: FakeService, path: str
) -> None:
    before = dict(service.store.records)

    for method in METHODS:
        response = keyed.request(method, path, headers=bearer("user-key"))
        assert response.status_code == 403, method
    assert service.store.records == before


@pytest.mark.parametrize("path", OPEN)
def test_probes_need_no_key(keyed: TestClient, path: str) -> None:
    assert keyed.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/admin/adapters"])
def test_the_admin_key_opens_everything(keyed: TestClient, path: str) -> None:
    assert keyed.get(path, headers=bearer("admin-key")).status_code == 200


def test_the_admin_key_defaults_to_the_api_key(make_client: Client) -> None:
    client = make_client(api_key="only")

    assert client.get("/admin/adapters", headers=bearer("only")).status_code == 200
    assert client.get("/admin/adapters").status_code == 401


def test_an_admin_key_alone_guards_admin_and_leaves_inference_local(make_client: Client) -> None:
    client = make_client(admin_key="boss")

    assert client.get("/v1/models").status_code == 200
    assert client.get("/admin/adapters").status_code == 401
    assert client.get("/admin/adapters", headers=bearer("boss")).status_code == 200


def test_two_authorization_headers_are_no_key(keyed: TestClient) -> None:
    headers = [("authorization", "Bearer user-key"), ("authorization", "Bearer user-key")]

    assert keyed.get("/v1/models", headers=headers).status_code == 401


def test_the_scheme_is_case_insensitive_and_must_be_bearer(keyed: TestClient) -> None:
    assert keyed.get("/v1/models", headers={"authorization": "bearer user-key"}).status_code == 200
    assert keyed.get("/v1/models", headers={"authorization": "Basic user-key"}).status_code == 401


def test_a_host_header_does_not_change_the_route(keyed: TestClient) -> None:
    for host in ("x/health?", "localhost/health#", "@/health"):
        assert keyed.get("/v1/models", headers={"host": host}).status_code == 401


def test_keys_are_in_no_answer(keyed: TestClient) -> None:
    response = keyed.get("/v1/models", headers=bearer("guess-123"))

    assert "guess-123" not in response.text
    assert "user-key" not in response.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.4", "example.org"])
def test_listening_to_others_without_a_key_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="api_key"):
        build_app(FakeService(tmp_path), ServerConfig(host=host, admin_key="x"))  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_loopback_addresses_are_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("path", ["/v1/models", "/admin/adapters", "/metrics"])
@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000"])
def test_local_mode_serves_local_names(client: TestClient, path: str, host: str) -> None:
    assert client.get(path, headers={"host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/admin/adapters", "/metrics", "/nope"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil", "[::2]"])
def test_local_mode_refuses_other_host_names(client: TestClient, path: str, host: str) -> None:
    assert client.get(path, headers={"host": host}).status_code == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("http://127.0.0.1", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_local_mode_refuses_pages_of_other_sites(
    client: TestClient, origin: str, status: int
) -> None:
    assert client.get("/v1/models", headers={"origin": origin}).status_code == status
