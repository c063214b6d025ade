"""vLLM's and SGLang's adapter endpoints: their codes, their texts, our rights."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from loriner.api.adapters import MAX_UPLOADS
from tests.api.conftest import Client
from tests.api.fake_service import FakeService

NEW = {"lora_name": "new", "lora_path": "made"}


@pytest.fixture
def client(make_client: Client, tmp_path: Path) -> TestClient:
    folder = tmp_path / "root" / "made"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return make_client(adapter_root=tmp_path / "root")


def test_vllm_loads_a_new_name_once(client: TestClient, service: FakeService) -> None:
    first = client.post("/v1/load_lora_adapter", json=NEW)
    assert (first.status_code, first.text) == (
        200,
        "Success: LoRA adapter 'new' added successfully.",
    )
    assert "default/new" in service.store.records

    again = client.post("/v1/load_lora_adapter", json=NEW)
    assert again.status_code == 400
    assert "'new' has already been loaded" in again.json()["error"]["message"]
    assert client.post("/v1/load_lora_adapter", json={**NEW, "load_inplace": True}).is_success


def test_vllm_unloads_what_is_there(client: TestClient, service: FakeService) -> None:
    gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "pirate"})
    assert (gone.status_code, gone.text) == (
        200,
        "Success: LoRA adapter 'pirate' removed successfully.",
    )
    assert "default/pirate" not in service.store.records
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "pirate"}).status_code == 404


@pytest.mark.parametrize("path", ["nowhere", "../store", "/etc"])
def test_a_path_outside_the_root_or_missing_is_absent(client: TestClient, path: str) -> None:
    for endpoint, status in (("/v1/load_lora_adapter", 404), ("/load_lora_adapter", 400)):
        refused = client.post(endpoint, json={**NEW, "lora_path": path})
        assert refused.status_code == status and f"`{path}` does not exist" in refused.text


@pytest.mark.parametrize("endpoint", ["/v1/load_lora_adapter", "/load_lora_adapter"])
def test_many_that_are_loaded_at_once_wait_for_each_other(
    client: TestClient, service: FakeService, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, running, most = service.publish, 0, 0

    async def slow(*args: Any, **more: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return await publish(*args, **more)

    monkeypatch.setattr(service, "publish", slow)
    with client, ThreadPoolExecutor(12) as threads:  # one event loop for all requests
        asked = [{**NEW, "lora_name": f"n{i}"} for i in range(12)]
        answers = list(threads.map(lambda body: client.post(endpoint, json=body), asked))
    assert [answer.status_code for answer in answers] == [200] * 12
    assert most == MAX_UPLOADS


def test_sglang_lists_what_is_loaded(client: TestClient, service: FakeService) -> None:
    made = client.post("/load_lora_adapter", json={**NEW, "pinned": True})
    assert made.status_code == 200 and made.json()["success"] is True
    assert "default/new" in made.json()["loaded_adapters"]
    assert service.store.records["default/new"].pinned

    again = client.post("/load_lora_adapter", json=NEW)
    assert again.status_code == 400 and again.json()["success"] is False
    assert "already been loaded" in again.json()["error_message"]

    left = client.post("/unload_lora_adapter", json={"lora_name": "new"})
    assert left.status_code == 200 and "default/new" not in left.json()["loaded_adapters"]
    assert client.post("/unload_lora_adapter", json={"lora_name": "new"}).status_code == 400


def test_a_tenant_unloads_its_own_and_loads_from_no_path(
    make_client: Client, tmp_path: Path, service: FakeService
) -> None:
    from loriner.api.tenants import Tenants

    _, token = Tenants(tmp_path / "store").create_key("acme", ["publish"])
    client = make_client()
    headers = {"authorization": f"Bearer {token}"}

    def ask(path: str, **asked: str) -> int:
        return client.post(path, json=asked, headers=headers).status_code

    assert ask("/v1/load_lora_adapter", **NEW) == 403
    assert ask("/v1/unload_lora_adapter", lora_name="default/pirate") == 404
    assert ask("/v1/unload_lora_adapter", lora_name="legal") == 200
    assert "acme/legal" not in service.store.records and "default/pirate" in service.store.records
