"""POST /v1/chat/completions: bodies and streams as OpenAI draws them, and who answered."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from loriner.core import Event, FinishReason
from loriner.errors import (
    AdapterTooLargeError,
    ContextLengthError,
    EngineFailedError,
    EngineUnavailableError,
    OverloadedError,
)
from tests.api.fake_service import BASE_DIGEST, FakeService
from tests.api.schemas import check, events

HI = [{"role": "user", "content": "hi"}]
PATH = "/v1/chat/completions"


def ask(client: TestClient, **fields: Any) -> Any:
    return client.post(PATH, json={"messages": HI, **fields})


def stream(client: TestClient, **fields: Any) -> list[Any]:
    response = ask(client, stream=True, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events(response.text)


def texts(chunks: list[Any], n: int = 1) -> list[str]:
    """The text of each choice, put together."""
    found = [""] * n
    for chunk in chunks:
        for choice in chunk["choices"]:
            found[choice["index"]] += choice["delta"].get("content", "")
    return found


def test_a_whole_answer_is_openais(client: TestClient, service: FakeService) -> None:
    body = ask(client, n=2).json()

    check("CreateChatCompletionResponse", body)
    assert [c["message"]["content"] for c in body["choices"]] == [
        "base answers you (0) ünï.",
        "base answers you (1) ünï.",
    ]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["logprobs"] is None
    assert body["choices"][0]["message"]["refusal"] is None
    assert body["id"].startswith("chatcmpl-")
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 12,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert len(service.closed) == 1


def test_an_answer_cut_by_max_tokens_says_length(client: TestClient) -> None:
    assert ask(client, max_tokens=2).json()["choices"][0]["finish_reason"] == "length"


ASSISTANT: list[dict[str, Any]] = [*HI, {"role": "assistant", "content": "Sure, "}]
ECHOED: list[tuple[list[dict[str, Any]], str]] = [
    (ASSISTANT, "Sure, "),
    ([*HI, {"role": "assistant", "content": [{"type": "text", "text": "Su"}] * 2}], "Su\nSu"),
    ([*HI, {"role": "assistant", "content": ""}], ""),
    (HI, ""),
]


@pytest.mark.parametrize(("messages", "echoed"), ECHOED)
@pytest.mark.parametrize("continued", [False, True])
def test_an_echoed_message_of_the_assistant_stands_before_the_answer(
    client: TestClient, messages: list[dict[str, Any]], echoed: str, continued: bool
) -> None:
    more = {"messages": messages, "n": 2, "continue_final_message": continued}
    whole = ask(client, echo=True, **more).json()
    chunks = stream(client, echo=True, **more)[:-1]
    plain = texts(stream(client, **more)[:-1], 2)

    assert plain == ["base answers you (0) ünï.", "base answers you (1) ünï."]
    assert [one["message"]["content"] for one in whole["choices"]] == [
        echoed + one for one in plain
    ]
    assert texts(chunks, 2) == [echoed + one for one in plain]
    check("CreateChatCompletionResponse", whole)
    for chunk in chunks:
        check("CreateChatCompletionStreamResponse", chunk)


def test_an_echo_stands_before_calls(client: TestClient, service: FakeService) -> None:
    service.says = ['<tool_call>{"name": "f", "arguments": {}}</tool_call>']
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = {"messages": ASSISTANT, "echo": True, "tools": tools}
    message = ask(client, **asked).json()["choices"][0]["message"]
    assert message["content"] == "Sure, " and message["tool_calls"]


def test_an_echo_with_logprobs_tells_of_the_prompt(client: TestClient) -> None:
    body = ask(client, messages=ASSISTANT, echo=True, logprobs=True, top_logprobs=2).json()
    (choice,) = body["choices"]

    assert choice["logprobs"]["content"][0]["token"] == "base", "of the answer alone"
    assert body["prompt_logprobs"][0] is None
    assert [len(entry) for entry in body["prompt_logprobs"][1:]] == [3] * (len("hiSure, "))
    assert "prompt_logprobs" not in ask(client, messages=ASSISTANT, echo=True).json()


def test_logprobs_are_openais(client: TestClient) -> None:
    body = ask(client, logprobs=True, top_logprobs=2, max_tokens=5).json()

    check("CreateChatCompletionResponse", body)
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    assert content[0]["token"] == "base"
    assert content[0]["bytes"] == list(b"base")
    assert [t["token"] for t in content[0]["top_logprobs"]] == ["t0", "t1"]
    assert content[4]["bytes"] == list(" ünï".encode())


def test_an_answer_names_the_generation_that_gave_it(
    client: TestClient, service: FakeService
) -> None:
    service.cold_start = True
    response = ask(client, adapter="pirate")
    generation = service.store.resolve("pirate").generation

    assert response.json()["loriner"] == {
        "adapter": "default/pirate",
        "generation": generation,
        "base_digest": BASE_DIGEST,
        "cold_start": True,
    }
    assert response.headers["x-loriner-generation"] == generation
    assert response.json()["model"] == "pirate"


def test_the_base_answers_as_itself(client: TestClient) -> None:
    response = ask(client)

    assert response.json()["model"] == "tiny"
    assert response.json()["loriner"]["adapter"] is None
    assert response.json()["loriner"]["generation"] is None
    assert response.headers["x-loriner-generation"] == "base"


@pytest.mark.parametrize("sent", ["abc-123", None, "with space", "x" * 65, "a\tb"])
def test_a_plain_request_id_is_echoed_and_any_other_replaced(
    client: TestClient, sent: str | None
) -> None:
    headers = {} if sent is None else {"x-request-id": sent}
    found = client.post(PATH, json={"messages": HI}, headers=headers).headers["x-request-id"]

    assert found == sent if sent == "abc-123" else found.startswith("req_")


def test_a_stream_has_a_role_the_text_one_finish_and_done(
    client: TestClient, service: FakeService
) -> None:
    *chunks, done = stream(client)

    assert done == "[DONE]"
    for chunk in chunks:
        check("CreateChatCompletionStreamResponse", chunk)
        assert "usage" not in chunk
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[0]["loriner"]["generation"] is None
    assert texts(chunks) == ["base answers you (0) ünï."]
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert finishes == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len(service.closed) == 1


def test_a_stream_of_n_choices_interleaves_and_finishes_each_once(client: TestClient) -> None:
    *chunks, _ = stream(client, n=3)

    assert texts(chunks, 3) == [f"base answers you ({i}) ünï." for i in range(3)]
    roles = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
    assert roles == [0, 1, 2]
    finished = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(finished) == [0, 1, 2]


def test_usage_comes_last_and_is_null_before(client: TestClient) -> None:
    *chunks, last, done = stream(client, stream_options={"include_usage": True})

    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["loriner"]["base_digest"] == BASE_DIGEST
    check("CreateChatCompletionStreamResponse", last)


def test_usage_can_come_with_every_chunk(client: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _, _ = stream(client, stream_options=options)

    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [0, 1, 2, 3, 4, 5, 6]


def test_streamed_logprobs_are_those_of_the_whole_answer(client: TestClient) -> None:
    *chunks, _ = stream(client, logprobs=True, top_logprobs=1)
    whole = ask(client, logprobs=True, top_logprobs=1).json()

    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    streamed = [entry for part in parts if part for entry in part["content"]]
    assert streamed == whole["choices"][0]["logprobs"]["content"]


def test_token_ids_come_when_asked_for(client: TestClient) -> None:
    whole = ask(client, return_token_ids=True).json()
    *chunks, _ = stream(client, return_token_ids=True)

    assert whole["prompt_token_ids"] == chunks[0]["prompt_token_ids"] == [1, 104, 105]
    assert whole["choices"][0]["token_ids"] == [10, 11, 12, 13, 14, 15]
    streamed = [i for chunk in chunks[1:] for i in chunk["choices"][0]["token_ids"]]
    assert streamed == whole["choices"][0]["token_ids"]
    assert "token_ids" not in ask(client).json()["choices"][0]


def test_an_event_without_text_makes_no_chunk(
    client: TestClient, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = [
        Event("r", 0, text="", token_ids=(1,), num_output_tokens=1),
        Event("r", 0, text="é", token_ids=(2,), num_output_tokens=2),
        Event("r", 0, num_output_tokens=2, finish_reason=FinishReason.STOP, stop_reason="x"),
    ]
    monkeypatch.setattr("tests.api.fake_service.script", lambda *args: halves)

    *chunks, _ = stream(client)

    assert [c["choices"][0]["delta"].get("content") for c in chunks] == ["", "é", None]
    assert chunks[-1]["choices"][0]["stop_reason"] == "x"


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ContextLengthError("too long", "messages"), 400, "context_length_exceeded"),
        (AdapterTooLargeError("too large"), 400, "adapter_too_large"),
        (OverloadedError("full"), 429, "queue_full"),
        (EngineUnavailableError("starting"), 503, "engine_unavailable"),
        (RuntimeError("secret"), 500, "internal_error"),
    ],
)
def test_a_refused_request_has_a_status_streamed_or_not(
    client: TestClient,
    service: FakeService,
    is_stream: bool,
    error: Exception,
    status: int,
    code: str,
) -> None:
    service.refuse = error
    response = ask(client, stream=is_stream)

    check("ErrorResponse", response.json())
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.headers["x-request-id"]
    assert "secret" not in response.text


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_failure_before_the_first_event_has_a_status(
    client: TestClient, service: FakeService, is_stream: bool
) -> None:
    service.fail_after, service.fail_with = 0, EngineFailedError("0x7f gone")
    response = ask(client, stream=is_stream)

    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_failed"
    assert "0x7f" not in response.text
    assert len(service.closed) == 1


def test_a_failure_after_the_first_byte_is_an_error_event(
    client: TestClient, service: FakeService
) -> None:
    service.fail_after, service.fail_with = 2, EngineFailedError("0x7f gone")
    *chunks, last = stream(client)

    assert texts(chunks) == ["base answers"]
    check("ErrorResponse", last)
    assert "0x7f" not in last["error"]["message"]
    assert len(service.closed) == 1


def test_a_failure_of_a_whole_answer_has_a_status_however_late(
    client: TestClient, service: FakeService
) -> None:
    service.fail_after, service.fail_with = 2, EngineFailedError("gone")

    assert ask(client).status_code == 500


def test_an_aborted_sequence_is_an_error_and_not_a_finish(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    aborted = [Event("r", 0, finish_reason=FinishReason.ABORT)]
    monkeypatch.setattr("tests.api.fake_service.script", lambda *args: aborted)

    assert ask(client).status_code == 503
    assert ask(client, stream=True).status_code == 503
