"""Tenants' keys and quotas on disk: made, found, revoked, never stored, seen by other processes."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from loriner.api.access import check_binding
from loriner.api.tenants import FILE, Quota, Tenants
from loriner.config import ServerConfig
from loriner.errors import ConfigError, InvalidRequestError, KeyNotFoundError


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    return Tenants(tmp_path / "store")


def test_without_keys_nothing_is_written(tenants: Tenants, tmp_path: Path) -> None:
    assert not tenants.has_keys and tenants.all_keys() == () and tenants.find("lor_a_b") is None
    assert not (tmp_path / "store").exists()


def test_a_key_is_found_by_its_token_alone(tenants: Tenants) -> None:
    key, token = tenants.create_key("acme", ["publish", "infer"], "ci")

    assert tenants.find(token) == key
    assert (key.tenant, key.scopes, key.note) == ("acme", ("infer", "publish"), "ci")
    for wrong in ("", token[:-1], token + "x", token.upper(), f"lor_{key.id}_", key.digest, "__"):
        assert tenants.find(wrong) is None


def test_secrets_are_not_stored(tenants: Tenants, tmp_path: Path) -> None:
    _, token = tenants.create_key("acme", ["infer"])
    stored = (tmp_path / "store" / FILE).read_text()

    assert token.rpartition("_")[2] not in stored
    assert hashlib.sha256(token.encode()).hexdigest() in stored
    assert (tmp_path / "store" / FILE).stat().st_mode & 0o077 == 0


def test_what_another_process_revokes_is_refused_at_once(tenants: Tenants, tmp_path: Path) -> None:
    key, token = tenants.create_key("acme", ["infer"])
    other = Tenants(tmp_path / "store")
    assert other.find(token) is not None
    revoked = other.revoke_key(key.id)

    assert tenants.find(token) is None and revoked.revoked_at is not None
    assert tenants.has_keys, "revoking the last key must not open the server"
    assert tenants.revoke_key(key.id) == revoked
    with pytest.raises(KeyNotFoundError):
        tenants.revoke_key("nope")


def test_keys_made_at_once_are_all_kept(tenants: Tenants, tmp_path: Path) -> None:
    others = [Tenants(tmp_path / "store") for _ in range(4)]

    def make(some: Tenants) -> None:
        for _ in range(5):
            some.create_key("acme", ["infer"])

    threads = [threading.Thread(target=make, args=(some,)) for some in [tenants, *others]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tenants.all_keys()) == 25 == len({key.id for key in tenants.all_keys()})


@pytest.mark.parametrize(
    ("tenant", "scopes", "note", "param"),
    [
        ("", ["infer"], "", "tenant"),
        ("A", ["infer"], "", "tenant"),
        ("a/b", ["infer"], "", "tenant"),
        ("..", ["infer"], "", "tenant"),
        ("acme", [], "", "scopes"),
        ("acme", ["root"], "", "scopes"),
        ("acme", ["infer"], "x" * 129, "note"),
    ],
)
def test_a_key_that_cannot_be_is_refused_by_name(
    tenants: Tenants, tenant: str, scopes: list[str], note: str, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tenants.create_key(tenant, scopes, note)
    assert caught.value.param == param and tenants.all_keys() == ()


def test_a_quota_is_kept_and_checked(tenants: Tenants, tmp_path: Path) -> None:
    assert tenants.quota("acme") == Quota()
    tenants.set_quota("acme", Quota(max_adapters=3))

    assert Tenants(tmp_path / "store").quota("acme") == Quota(max_adapters=3)
    with pytest.raises(InvalidRequestError, match="max_bytes"):
        tenants.set_quota("acme", Quota(max_bytes=-1))


def test_a_damaged_file_lets_nobody_in(tenants: Tenants, tmp_path: Path) -> None:
    _, token = tenants.create_key("acme", ["infer"])
    (tmp_path / "store" / FILE).write_text("{")

    for ask in (lambda: tenants.find(token), lambda: tenants.has_keys):
        with pytest.raises(ConfigError):
            ask()


def test_with_a_tenants_key_a_network_may_be_served(tenants: Tenants, tmp_path: Path) -> None:
    config = ServerConfig(host="0.0.0.0", store=tmp_path / "store")
    with pytest.raises(ConfigError, match="loriner keys create"):
        check_binding(config)
    tenants.create_key("acme", ["admin"])
    check_binding(config)
