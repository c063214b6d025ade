"""Quotas: what a tenant may have at once, by the minute and in the store; nobody else notices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from loriner.api.quotas import Quotas
from loriner.api.tenants import Quota, Tenants
from loriner.core import Turn
from loriner.errors import QuotaExceededError
from loriner_proto.v1 import adapters_pb2
from tests.api.conftest import Client
from tests.api.fake_service import FakeService
from tests.api.grpc_kit import Door, chat, refused
from tests.api.live import wait_until

TURNS = {"messages": [{"role": "user", "content": "hi"}]}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    return Tenants(tmp_path / "store")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(tenants: Tenants, clock: Clock) -> Quotas:
    return Quotas(tenants, now=clock)


def test_without_a_quota_nothing_is_bounded(quotas: Quotas) -> None:
    with quotas.running("a", 10**6) as spend, quotas.uploading("default"):
        spend(10**9)
    assert not quotas._usage


def test_no_tenant_takes_every_place_for_uploads(quotas: Quotas, tenants: Tenants) -> None:
    uploading = quotas.uploading
    with uploading("a"), uploading("a"), pytest.raises(QuotaExceededError), uploading("a"):
        pass
    tenants.set_quota("a", Quota(max_uploads=3))
    with uploading("a"), uploading("a"), uploading("a"):
        pass


def test_sequences_are_counted_and_given_back(quotas: Quotas, tenants: Tenants) -> None:
    tenants.set_quota("a", Quota(max_sequences=3))
    with pytest.raises(ZeroDivisionError), quotas.running("a", 2):
        with pytest.raises(QuotaExceededError) as caught, quotas.running("a", 2):
            pass
        assert caught.value.retry_after_s is not None
        with quotas.running("b", 100):
            pass
        raise ZeroDivisionError
    with quotas.running("a", 3):
        pass
    with pytest.raises(QuotaExceededError) as caught, quotas.running("a", 4):
        pass
    assert caught.value.retry_after_s is None, "waiting does not help"


def test_no_tenant_fills_the_queue_unless_its_quota_says_so(tenants: Tenants) -> None:
    quotas = Quotas(tenants, places=8, share=0.5)
    with quotas.running("a", 4), pytest.raises(QuotaExceededError), quotas.running("a", 1):
        pass
    with quotas.running("default", 100):
        pass
    tenants.set_quota("a", Quota(max_sequences=9))
    with quotas.running("a", 9):
        pass


def test_however_many_flood_another_finds_room(tenants: Tenants) -> None:
    quotas = Quotas(tenants, places=128, share=0.5)
    with ExitStack() as floods:
        for tenant in "abcdef":
            with pytest.raises(QuotaExceededError):
                while True:
                    floods.enter_context(quotas.running(tenant, 1))
        with quotas.running("quiet", 1):
            pass
        assert quotas._num_sequences < 128
    with quotas.running("quiet", 64):
        pass


def test_tokens_come_back_with_time(quotas: Quotas, tenants: Tenants, clock: Clock) -> None:
    tenants.set_quota("a", Quota(tokens_per_minute=60))
    with quotas.running("a", 1) as spend:
        spend(30)
        spend(45)  # an answer is not cut
    with pytest.raises(QuotaExceededError) as caught, quotas.running("a", 1):
        pass
    assert caught.value.retry_after_s == pytest.approx(15.0)
    clock.now += 15.1
    with quotas.running("a", 1):
        pass
    clock.now += 1000
    with quotas.running("a", 1):
        pass
    assert not quotas._usage


def test_over_a_long_time_the_rate_holds(quotas: Quotas, tenants: Tenants, clock: Clock) -> None:
    tenants.set_quota("a", Quota(tokens_per_minute=600))
    used = 0
    for _ in range(6000):
        clock.now += 0.1
        try:
            with quotas.running("a", 1) as spend:
                spend(50)
                used += 50
        except QuotaExceededError:
            pass
    assert 600 * 10 <= used <= 600 * 11 + 50


@pytest.fixture
def keyed(make_client: Client, tenants: Tenants) -> Callable[[str], TestClient]:
    """A client for a tenant, with a key that may do everything of its own."""

    def make(tenant: str) -> TestClient:
        _, token = tenants.create_key(tenant, ["infer", "read", "publish"])
        client = make_client()
        client.headers["authorization"] = f"Bearer {token}"
        return client

    return make


def test_a_tenant_above_its_tokens_is_told_when_to_come_back(
    keyed: Callable[[str], TestClient], tenants: Tenants
) -> None:
    tenants.set_quota("acme", Quota(tokens_per_minute=5))
    client = keyed("acme")
    assert client.post("/v1/chat/completions", json=TURNS).status_code == 200
    response = client.post("/v1/chat/completions", json=TURNS)

    assert response.status_code == 429 and "retry-after" in response.headers
    assert response.json()["error"]["code"] == "quota_exceeded"
    assert keyed("other").post("/v1/chat/completions", json=TURNS).status_code == 200


def upload(client: TestClient, name: str, size: int = 10) -> Any:
    files = {
        "adapter_config.json": ("c", b"{}"),
        "adapter_model.safetensors": ("m", name.encode() + bytes(size)),
    }
    return client.post("/admin/adapters", data={"name": name}, files=files)


def test_adapters_and_bytes_are_bounded(
    keyed: Callable[[str], TestClient], tenants: Tenants, service: FakeService
) -> None:
    client = keyed("acme")
    tenants.set_quota("acme", Quota(max_adapters=2))
    service.store.records.clear()
    assert upload(client, "a").status_code == upload(client, "b").status_code == 201
    refused = upload(client, "c")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
    assert "retry-after" not in refused.headers
    assert refused.headers["x-should-retry"] == "false"
    assert upload(client, "a").status_code == 201, "a name that is there may move"
    alias = client.put("/admin/aliases/acme/x", json={"target": "acme/a"})
    assert alias.status_code == 429

    tenants.set_quota("acme", Quota(max_bytes=2500))  # the fake counts 1000 for each
    assert upload(client, "c", 400).status_code == 201
    assert upload(client, "d", 3000).status_code == 429
    assert sorted(service.store.records) == ["acme/a", "acme/b", "acme/c"]


def test_a_tenants_weight_goes_with_its_requests(
    keyed: Callable[[str], TestClient], tenants: Tenants, service: FakeService
) -> None:
    tenants.set_quota("acme", Quota(weight=2.5))
    for tenant in ("acme", "other"):
        keyed(tenant).post("/v1/chat/completions", json={**TURNS, "priority": -3})

    assert [(call["tenant"], call["turn"]) for call in service.calls] == [
        ("acme", Turn(2.5, -3)),
        ("other", Turn(1.0, -3)),
    ]


def test_both_doors_count_together(
    make_door: Callable[..., Door], tenants: Tenants, service: FakeService
) -> None:
    _, token = tenants.create_key("acme", ["infer", "publish"])
    tenants.set_quota("acme", Quota(max_sequences=1, max_uploads=0))
    door, metadata = make_door(), (("authorization", f"Bearer {token}"),)
    service.hold = asyncio.Event()
    held = door.inference.Chat.future(chat(), metadata=metadata)
    wait_until(lambda: len(service.open) == 1)
    found = refused(lambda: door.inference.Chat(chat(), metadata=metadata))
    assert (found.code, found.reason) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    assert "RetryInfo" in found.details

    held.cancel()
    wait_until(lambda: len(service.closed) == 1)
    service.hold = None
    assert door.inference.Chat(chat(), metadata=metadata).choices
    parts = iter([adapters_pb2.UploadRequest(header=adapters_pb2.UploadHeader(name="x"))])
    assert refused(lambda: door.adapters.Upload(parts, metadata=metadata)).reason == (
        "QUOTA_EXCEEDED"
    )
