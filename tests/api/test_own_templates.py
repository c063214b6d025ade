"""An adapter's own chat template: for requests that name it alone, and for just its generation."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from loriner.core import Scaled
from tests.api.fake_service import FakeService

OWN = "{{ tools }}[TOOL_CALLS]<think></think>"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def digest(service: FakeService) -> str:
    """Of `pirate`, which brings one."""
    found = service.store.resolve("pirate").generation
    service.templates[found] = OWN
    return found


def chat(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": HI, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": "pirate"},
        {"model": "pirate"},
        {"model": "tiny:pirate"},
        {"adapter": [{"name": "pirate"}]},
    ],
)
def test_it_serves_a_request_for_the_adapter_alone(
    client: TestClient, service: FakeService, digest: str, fields: dict[str, Any]
) -> None:
    answer = chat(client, **fields)

    assert answer.status_code == 200, answer.text
    assert service.rendered[0]["template"] == OWN
    assert service.calls[0]["adapter"] == f"default/pirate@{digest}"
    assert answer.json()["loriner"]["adapter"] == "default/pirate"


def test_it_serves_the_adapter_with_a_scale(
    client: TestClient, service: FakeService, digest: str
) -> None:
    assert chat(client, adapter={"name": "pirate", "scale": 0.5}).status_code == 200
    assert service.rendered[0]["template"] == OWN
    assert service.calls[0]["adapter"] == [Scaled(f"default/pirate@{digest}", 0.5)]


@pytest.mark.parametrize(
    "fields", [{}, {"adapter": "codeword"}, {"adapter": [{"name": "pirate"}, {"name": "codeword"}]}]
)
def test_all_others_have_the_bases(
    client: TestClient, service: FakeService, digest: str, fields: dict[str, Any]
) -> None:
    assert chat(client, **fields).status_code == 200
    assert service.rendered[0]["template"] is None


def test_tools_and_reasoning_are_in_its_way(
    client: TestClient, service: FakeService, digest: str
) -> None:
    service.says = ["<think>so</think>", '[TOOL_CALLS][{"name": "f", "arguments": {}}]']
    tools = [{"type": "function", "function": {"name": "f"}}]
    message = chat(client, adapter="pirate", tools=tools).json()["choices"][0]["message"]

    assert message["reasoning"] == "so" and len(message["tool_calls"][0]["id"]) == 9


def test_a_response_has_it_too(client: TestClient, service: FakeService, digest: str) -> None:
    asked = {"input": "hi", "adapter": "pirate"}
    assert client.post("/v1/responses", json=asked).status_code == 200
    assert service.rendered[0]["template"] == OWN


def test_a_completion_has_none(client: TestClient, service: FakeService, digest: str) -> None:
    asked = {"prompt": "hi", "adapter": "pirate"}
    assert client.post("/v1/completions", json=asked).status_code == 200
    assert service.rendered == [] and service.calls[0]["adapter"] == "pirate"


def test_an_unknown_adapter_is_what_it_was(client: TestClient) -> None:
    for fields, param in (({"adapter": "nobody"}, "adapter"), ({"model": "nobody"}, "model")):
        refused = chat(client, **fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, param)


def test_a_name_that_moves_to_a_template_meanwhile_is_a_conflict(
    client: TestClient, service: FakeService
) -> None:
    """The prompt was rendered with the base's before the name came to stand for the other one."""
    from dataclasses import replace

    store = service.store
    store.records["default/pirate"] = replace(store.resolve("pirate"), has_template=True)
    refused = chat(client, adapter="pirate")

    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_conflict")
    assert len(service.closed) == 1
