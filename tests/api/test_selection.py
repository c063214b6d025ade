"""Which weights answer: `adapter`, then `model`, then the base; and what an unknown name gets."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.api.fake_service import FakeService

HI = [{"role": "user", "content": "hi"}]


def ask(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": HI, **fields})


@pytest.mark.parametrize(
    ("fields", "adapter", "model"),
    [
        ({}, None, "tiny"),
        ({"model": "tiny"}, None, "tiny"),
        ({"model": None, "adapter": None}, None, "tiny"),
        ({"model": "tiny", "adapter": None}, None, "tiny"),
        ({"model": "tiny", "adapter": ""}, None, "tiny"),
        ({"model": "tiny", "adapter": "base"}, None, "tiny"),
        ({"model": "tiny:base"}, None, "tiny"),
        ({"model": "pirate", "adapter": ""}, None, "tiny"),
        ({"model": "pirate", "adapter": "base"}, None, "tiny"),
        ({"model": "pirate"}, "default/pirate", "pirate"),
        ({"model": "default/pirate"}, "default/pirate", "default/pirate"),
        ({"model": "pirate", "adapter": None}, "default/pirate", "pirate"),
        ({"model": "tiny:pirate"}, "default/pirate", "pirate"),
        ({"model": "tiny:acme/legal"}, "acme/legal", "acme/legal"),
        ({"model": "tiny", "adapter": "pirate"}, "default/pirate", "pirate"),
        ({"model": "whatever", "adapter": "pirate"}, "default/pirate", "pirate"),
        ({"model": "codeword", "adapter": "acme/legal"}, "acme/legal", "acme/legal"),
        ({"adapter": "default/pirate"}, "default/pirate", "default/pirate"),
    ],
)
def test_adapter_wins_then_model_then_base(
    client: TestClient, fields: dict[str, Any], adapter: str | None, model: str
) -> None:
    body = ask(client, **fields).json()

    assert body["loriner"]["adapter"] == adapter
    assert body["model"] == model


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "model", ["gpt-5", "legal", "other:pirate", "tiny:nope", "GPT 5", "../x", "a/b/c", "", "é\n"]
)
def test_an_unknown_model_is_404_and_names_model(
    client: TestClient, model: str, is_stream: bool
) -> None:
    response = ask(client, model=model, stream=is_stream)

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["param"] == "model"


@pytest.mark.parametrize("adapter", ["nope", "legal", "PIRATE", "../pirate", "pirate@0", "a/b/c"])
def test_an_unknown_adapter_is_404_and_names_adapter(client: TestClient, adapter: str) -> None:
    response = ask(client, model="tiny", adapter=adapter)

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "adapter_not_found"
    assert response.json()["error"]["param"] == "adapter"


def test_an_unknown_name_is_told_no_other_name(client: TestClient) -> None:
    for fields in ({"model": "nope"}, {"adapter": "nope"}):
        text = ask(client, **fields).text
        assert "pirate" not in text
        assert "legal" not in text


def test_an_adapter_named_like_the_base_does_not_take_its_place(
    client: TestClient, service: FakeService
) -> None:
    service.store.add("tiny")

    assert ask(client, model="tiny").json()["loriner"]["adapter"] is None
    assert ask(client, adapter="tiny").json()["loriner"]["adapter"] == "default/tiny"


def test_one_generation_can_be_named_by_its_digest(
    client: TestClient, service: FakeService
) -> None:
    digest = service.store.resolve("pirate").generation

    assert ask(client, adapter=f"pirate@{digest[:12]}").json()["loriner"]["generation"] == digest
    assert ask(client, adapter=f"pirate@{'0' * 12}").status_code == 404
