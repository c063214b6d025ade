"""An adapter's own chat template: for requests that name it alone, and for just its generation."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from loriner.core import Scaled
from loriner_proto.v1 import inference_pb2 as pb
from tests.api.fake_service import FakeService
from tests.api.grpc_kit import Door, refused
from tests.api.grpc_kit import chat as grpc_chat

OWN = "{{ tools }}[TOOL_CALLS]<think></think>"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def digest(service: FakeService) -> str:
    """Of `pirate`, which brings one."""
    found = service.store.resolve("pirate").generation
    service.templates[found] = OWN
    return found


def tokenized(client: TestClient, **fields: Any) -> Any:
    return client.post("/tokenize", json={"messages": HI, **fields})


def chat(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": HI, **fields})


ALONE: list[dict[str, Any]] = [
    {"adapter": "pirate"},
    {"model": "pirate"},
    {"model": "tiny:pirate"},
    {"adapter": [{"name": "pirate"}]},
]
OTHERS: list[dict[str, Any]] = [
    {},
    {"adapter": "codeword"},
    {"adapter": [{"name": "pirate"}, {"name": "codeword"}]},
]


@pytest.mark.parametrize("fields", ALONE)
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


@pytest.mark.parametrize("fields", OTHERS)
def test_all_others_have_the_bases(
    client: TestClient, service: FakeService, digest: str, fields: dict[str, Any]
) -> None:
    assert chat(client, **fields).status_code == 200
    assert service.rendered[0]["template"] is None


@pytest.mark.parametrize("fields", [*ALONE, *OTHERS])
def test_tokens_are_those_of_the_chat(
    client: TestClient, service: FakeService, digest: str, fields: dict[str, Any]
) -> None:
    assert tokenized(client, **fields).status_code == 200
    assert chat(client, **fields).status_code == 200
    assert service.rendered[0] == service.rendered[1]
    assert service.rendered[0]["template"] == (OWN if fields in ALONE else None)


def test_tokens_are_those_of_the_chat_over_grpc(
    door: Door, service: FakeService, digest: str
) -> None:
    for asked in ({"adapter": "pirate"}, {"model": "pirate"}, {"adapter": "codeword"}):
        door.inference.Tokenize(pb.TokenizeRequest(chat=grpc_chat("hi", **asked)))
        door.inference.Chat(grpc_chat("hi", **asked))
    assert [one["template"] for one in service.rendered] == [OWN] * 4 + [None] * 2

    nobody = pb.TokenizeRequest(chat=grpc_chat("hi", adapter="nobody"))
    refusal = refused(lambda: door.inference.Tokenize(nobody))
    assert (refusal.code, refusal.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")


def test_the_adapter_is_held_while_its_template_is_rendered(
    client: TestClient, service: FakeService, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    render = service.render_chat

    async def watched(*args: Any, **more: Any) -> list[int]:
        held.extend(service.held)
        return await render(*args, **more)

    monkeypatch.setattr(service, "render_chat", watched)
    assert tokenized(client, adapter="pirate").status_code == 200
    assert held == [["default/pirate"]] and service.held == []


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
        refusal, other = chat(client, **fields), tokenized(client, **fields)
        assert (refusal.status_code, refusal.json()["error"]["param"]) == (404, param)
        assert (other.status_code, other.json()["error"]) == (404, refusal.json()["error"])


def test_a_name_that_moves_to_a_template_meanwhile_is_a_conflict(
    client: TestClient, service: FakeService
) -> None:
    """The prompt was rendered with the base's before the name came to stand for the other one."""
    from dataclasses import replace

    store = service.store
    store.records["default/pirate"] = replace(store.resolve("pirate"), has_template=True)
    refusal = chat(client, adapter="pirate")

    assert (refusal.status_code, refusal.json()["error"]["code"]) == (409, "adapter_conflict")
    assert len(service.closed) == 1
