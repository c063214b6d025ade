"""/tokenize and /detokenize, in vLLM's shape."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.api.fake_service import FakeService

TURNS = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_a_text_and_its_tokens_are_told(client: TestClient, prefix: str) -> None:
    answer = client.post(f"{prefix}/tokenize", json={"prompt": "hi", "model": "tiny"}).json()
    back = client.post(f"{prefix}/detokenize", json={"tokens": answer["tokens"][1:]}).json()

    assert answer.pop("token_strs") is None
    assert answer == {"count": 3, "max_model_len": 512, "tokens": [1, 104, 105]}
    assert back == {"prompt": "hi"}


def test_special_tokens_may_be_left_out_and_texts_asked_for(client: TestClient) -> None:
    body = {"prompt": "hi", "add_special_tokens": False, "return_token_strs": True}
    answer = client.post("/tokenize", json=body).json()

    assert answer["tokens"] == [104, 105] and answer["token_strs"] == ["<104>", "<105>"]


def test_a_conversation_goes_through_the_template(client: TestClient) -> None:
    assert client.post("/tokenize", json={"messages": TURNS}).json()["tokens"] == [1, 104, 105]


def test_tools_count_in_a_conversation(client: TestClient, service: FakeService) -> None:
    body = {"messages": TURNS, "tools": [TOOL]}
    assert client.post("/tokenize", json=body).status_code == 200
    assert service.rendered[0]["tools"][0]["function"]["name"] == "f"


def test_special_tokens_may_stand_beside_the_templates(
    client: TestClient, service: FakeService
) -> None:
    for asked in ({}, {"add_special_tokens": True}):
        for path in ("/tokenize", "/v1/chat/completions"):
            body = {"messages": TURNS, **asked}
            assert client.post(path, json=body).status_code == 200
    assert [one["add_special_tokens"] for one in service.rendered] == [False, False, True, True]


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL], "parallel_tool_calls": False},
        {"chat_template_kwargs": {"mood": "gay"}},
        {"add_generation_prompt": False},
        {"reasoning_effort": "none"},
    ],
    ids=lambda more: "-".join(more),
)
def test_a_conversation_is_rendered_as_the_chat_would_be(
    client: TestClient, service: FakeService, more: dict[str, Any]
) -> None:
    body = {"messages": TURNS, **more}
    tokens = client.post("/tokenize", json=body).json()["tokens"]
    answer = client.post("/v1/chat/completions", json={**body, "return_token_ids": True}).json()

    assert tokens == answer["prompt_token_ids"]
    assert service.rendered[0] == service.rendered[1]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
@pytest.mark.parametrize("param", ["model", "adapter"])
def test_names_are_those_of_a_chat(client: TestClient, path: str, param: str) -> None:
    body = {"prompt": "x"} if path == "/tokenize" else {"tokens": [65]}
    assert client.post(path, json={**body, param: "pirate"}).status_code == 200

    absent = client.post(path, json={**body, param: "nobody"})
    assert (absent.status_code, absent.json()["error"]["param"]) == (404, param)


def test_nothing_is_no_tokens(client: TestClient) -> None:
    assert client.post("/tokenize", json={"prompt": ""}).json()["count"] == 1
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": TURNS}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": TURNS, "tools": [{}]}, "tools[0].type"),
        ("/tokenize", {"prompt": "x", "tools": [TOOL]}, "tools"),
        (
            "/tokenize",
            {"messages": TURNS, "chat_template_kwargs": {"tools": 1}},
            "chat_template_kwargs",
        ),
        (
            "/tokenize",
            {"messages": TURNS, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        ("/tokenize", {"messages": TURNS, "tool_choice": "required"}, "tool_choice"),
        ("/tokenize", {"messages": TURNS, "reasoning_effort": "huge"}, "reasoning_effort"),
        ("/tokenize", {"prompt": "x", "lora_path": "pirate"}, "lora_path"),
        ("/tokenize", {"prompt": "x", "adapter": [{"name": "a"}, {"name": "a"}]}, "adapter"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**31]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
def test_what_is_refused_is_named(
    client: TestClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = client.post(path, json=body)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
