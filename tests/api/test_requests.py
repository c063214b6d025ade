"""What a request may say: each parameter is served or refused by name, each body answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from loriner.api.response_body import ResponseBody
from loriner.api.schema import ChatBody, CompletionBody
from loriner.api.unserved import CHAT, COMPLETION, RESPONSES
from loriner.core import SamplingParams
from tests.api.conftest import Client
from tests.api.fake_service import FakeService

PARAMETERS = json.loads(
    (Path(__file__).parents[1] / "data" / "openai" / "schemas.json").read_text()
)["request_parameters"]

# Accepted whatever they say: they change nothing about the answer.
HARMLESS = {
    *("user", "metadata", "service_tier", "safety_identifier", "verbosity", "prediction"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}
HI = [{"role": "user", "content": "hi"}]


def chat(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": HI, **fields})


def complete(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/completions", json={"prompt": "hi", **fields})


def refusal(response: Any) -> tuple[int, str | None]:
    return response.status_code, response.json()["error"]["param"]


@pytest.mark.parametrize("name", PARAMETERS["chat"])
def test_every_chat_parameter_of_openai_is_served_refused_or_harmless(name: str) -> None:
    assert (name in ChatBody.model_fields) + (name in CHAT) + (name in HARMLESS) == 1


@pytest.mark.parametrize("name", PARAMETERS["completions"])
def test_every_completion_parameter_of_openai_is_served_refused_or_harmless(name: str) -> None:
    served = name in CompletionBody.model_fields
    assert served + (name in COMPLETION) + (name in HARMLESS) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("web_search_options", {}),
        ("store", True),
        ("store", 0),
        ("reasoning_effort", "high"),
        ("guided_json", {"type": "object"}),
        ("ebnf", "root ::= x"),
        ("bad_words", ["x"]),
        ("chat_template", "{{ 1 }}"),
        ("cache_salt", "x"),
        ("priority", 1001),
        ("lora_path", "pirate"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    client: TestClient, service: FakeService, name: str, value: object
) -> None:
    response = chat(client, **{name: value})

    assert refusal(response) == (400, name)
    assert service.calls == []


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "functions": []},
        {"response_format": {"type": "text"}, "modalities": ["text"], "structured_outputs": {}},
        {"store": False, "user": "u", "metadata": {"a": "b"}, "service_tier": "auto"},
        {"parallel_tool_calls": False, "prediction": {"type": "content", "content": "x"}},
        {"safety_identifier": "s", "prompt_cache_key": "k", "verbosity": "low"},
        {"no_such_parameter": {"x": 1}},
        dict.fromkeys(sorted({*PARAMETERS["chat"], *ChatBody.model_fields} - {"messages"})),
    ],
)
def test_harmless_unknown_and_null_fields_are_accepted(
    client: TestClient, fields: dict[str, object]
) -> None:
    response = chat(client, **fields)

    assert response.status_code == 200, response.text


def test_null_means_unset_for_completions_too(client: TestClient, service: FakeService) -> None:
    names = {*PARAMETERS["completions"], *CompletionBody.model_fields} - {"prompt"}

    assert complete(client, **dict.fromkeys(sorted(names))).status_code == 200
    assert service.calls[0]["sampling"] == SamplingParams(max_tokens=16)


def test_chat_defaults_are_openais(client: TestClient, service: FakeService) -> None:
    chat(client)

    assert service.calls[0]["sampling"] == SamplingParams(max_tokens=None, temperature=1.0)


def test_every_sampling_field_reaches_the_engine(client: TestClient, service: FakeService) -> None:
    asked: dict[str, Any] = {
        "max_completion_tokens": 7,
        "max_tokens": 99,
        "min_tokens": 2,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.1,
        "seed": -3,
        "repetition_penalty": 1.5,
        "frequency_penalty": -1,
        "presence_penalty": 2,
        "logit_bias": {"5": -100, "6": 1.5},
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "n": 3,
        "logprobs": True,
        "top_logprobs": 4,
    }
    assert chat(client, **asked).status_code == 200

    assert service.calls[0]["sampling"] == SamplingParams(
        max_tokens=7,
        min_tokens=2,
        temperature=0.0,
        top_p=0.5,
        top_k=5,
        min_p=0.1,
        seed=-3,
        repetition_penalty=1.5,
        frequency_penalty=-1.0,
        presence_penalty=2.0,
        logit_bias=((5, -100.0), (6, 1.5)),
        stop=("a", "b"),
        stop_token_ids=(1, 2),
        include_stop_str_in_output=True,
        ignore_eos=True,
        n=3,
        logprobs=4,
    )


def test_top_k_minus_one_is_all_and_stop_may_be_one_string(
    client: TestClient, service: FakeService
) -> None:
    chat(client, top_k=-1, stop="x", logprobs=True)

    sampling = service.calls[0]["sampling"]
    assert (sampling.top_k, sampling.stop, sampling.logprobs) == (0, ("x",), 0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"temperature": 10**400}, "temperature"),
        ({"seed": 2**63}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
        ),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"model": "x" * 257}, "model"),
        ({"adapter": ["pirate"]}, "adapter[0]"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [*HI, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": HI * 4097}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs.x"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
    ],
)
def test_a_bad_value_is_400_and_names_its_field(
    client: TestClient, service: FakeService, fields: dict[str, Any], param: str
) -> None:
    response = chat(client, **fields)

    assert refusal(response) == (400, param), response.text
    assert service.calls == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [[1], ["a"]]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**40], "echo": True}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 64, "n": 3}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"prompt": ["a" * 500] * 101, "prompt_logprobs": 20}, "prompt_logprobs"),
        ({"prompt": ["a" * 500] * 101, "echo": True, "logprobs": 20}, "echo"),
    ],
)
def test_a_bad_completion_is_400_and_names_its_field(
    client: TestClient, service: FakeService, fields: dict[str, Any], param: str
) -> None:
    response = complete(client, **fields)

    assert refusal(response) == (400, param), response.text
    assert service.calls == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"messages": Infinity}',
        b'{"temperature": 1e999}',
        b'{"messages": "\\ud800"}',
        b"[" * 100_000,
        b'{"messages":' * 50_000,
        b'{"n": 1' + b"0" * 5000 + b"}",
    ],
    ids=lambda body: body[:20].decode("latin-1"),
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/admin/adapters"])
def test_bytes_that_are_no_request_are_400(client: TestClient, path: str, body: bytes) -> None:
    response = client.post(path, content=body, headers={"content-type": "application/json"})

    assert response.status_code == 400
    assert response.json()["error"].keys() >= {"message", "type", "param", "code"}


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_the_content_type_of_json_does_not_matter(client: TestClient, content_type: str) -> None:
    body = json.dumps({"messages": HI})
    headers = {"content-type": content_type} if content_type else {}

    response = client.post("/v1/chat/completions", content=body, headers=headers)

    assert response.status_code == 200


def test_a_body_over_the_limit_is_413_whether_or_not_it_says_so(make_client: Client) -> None:
    client = make_client(max_body_bytes=1000)
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 1000}]}).encode()

    declared = client.post("/v1/chat/completions", content=body)
    chunked = client.post("/v1/chat/completions", content=iter([body[:600], body[600:]]))

    assert declared.status_code == chunked.status_code == 413
    assert declared.json()["error"]["code"] == "payload_too_large"


def test_a_large_body_is_read_off_the_loop_with_the_same_result(
    client: TestClient, service: FakeService
) -> None:
    assert complete(client, prompt=list(range(30_000))).status_code == 200
    assert service.calls[0]["prompt_ids"] == list(range(30_000))
    assert complete(client, prompt="x" * 100_000).status_code == 200
    assert len(service.calls[1]["prompt_ids"]) == 100_001


def test_messages_reach_the_template_plain(client: TestClient, service: FakeService) -> None:
    messages = [
        {"role": "developer", "content": "be brief", "x": 1},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
            ],
        },
        {"role": "tool", "content": "4", "tool_call_id": "c"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "refusal": None},
        {"role": "user", "content": "c", "name": "bob"},
    ]
    response = chat(client, messages=messages, chat_template_kwargs={"thinking": False})

    assert response.status_code == 200, response.text
    rendered = service.rendered[0]
    assert rendered["template_kwargs"] == {"thinking": False}
    assert rendered["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
            ],
        },
        {"role": "tool", "content": "4", "tool_call_id": "c"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "c", "name": "bob"},
    ]


def test_a_final_message_can_be_continued(client: TestClient, service: FakeService) -> None:
    chat(client, continue_final_message=True)
    chat(client, add_generation_prompt=False)
    chat(client)

    asked = [(r["add_generation_prompt"], r["continue_final_message"]) for r in service.rendered]
    assert asked == [(False, True), (False, False), (True, False)]


def test_special_tokens_can_be_left_out_of_a_completion(
    client: TestClient, service: FakeService
) -> None:
    complete(client)
    complete(client, add_special_tokens=False)

    assert [len(call["prompt_ids"]) for call in service.calls] == [3, 2]


BODIES = (ChatBody, CompletionBody, ResponseBody)
FIELDS = sorted({*CHAT, *RESPONSES}.union(*(body.model_fields for body in BODIES)))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=120,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/responses"]),
    fields=st.dictionaries(
        st.sampled_from(FIELDS),
        JSON,
        max_size=4,
    ),
)
def test_no_body_is_a_server_error(client: TestClient, path: str, fields: dict[str, Any]) -> None:
    asked = {"input": "hi"} if path == "/v1/responses" else {"messages": HI, "prompt": "hi"}
    response = client.post(path, json={**asked, **fields})

    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


def test_refusals_tell_what_was_wrong_and_what_is_right(client: TestClient) -> None:
    keys = chat(client, logit_bias={"bad1": 1, "7": 1, "bad2": 1})
    assert keys.json()["error"]["message"] == "logit_bias keys must be token ids, not bad1, bad2."
    seed = chat(client, seed=2**63)
    assert "[-9223372036854775808, 9223372036854775807]" in seed.json()["error"]["message"]
    assert "must be in [0, 2]" in chat(client, temperature=3).json()["error"]["message"]
