"""POST /v1/completions: prompts of every kind, echo, logprobs, streamed and not."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from loriner.errors import EngineFailedError, OverloadedError
from tests.api.fake_service import FakeService
from tests.api.schemas import check, events


def ask(client: TestClient, **fields: Any) -> Any:
    response = client.post("/v1/completions", json={"prompt": "hi", **fields})
    assert response.status_code == 200, response.text
    return events(response.text) if fields.get("stream") else response.json()


def texts(chunks: list[Any], count: int) -> list[str]:
    found = [""] * count
    for chunk in chunks:
        for choice in chunk["choices"]:
            found[choice["index"]] += choice["text"]
    return found


def test_a_whole_answer_is_openais(client: TestClient, service: FakeService) -> None:
    body = ask(client, model="pirate", logprobs=1)

    check("CreateCompletionResponse", body)
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "pirate answers you (0) ünï."
    assert body["loriner"]["adapter"] == "default/pirate"
    assert service.calls[0]["prompt_param"] == "prompt"


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("hi", [[1, 104, 105]]),
        (["a", "b"], [[1, 97], [1, 98]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        (["a", [9]], [[1, 97], [9]]),
        ("", [[1]]),
    ],
)
def test_prompts_are_text_or_tokens_one_or_many(
    client: TestClient, service: FakeService, prompt: object, sent: list[list[int]]
) -> None:
    body = ask(client, prompt=prompt)

    assert [call["prompt_ids"] for call in service.calls] == sent
    assert len(body["choices"]) == len(sent)
    assert len({call["request_id"] for call in service.calls}) == len(sent)


@pytest.mark.parametrize("is_stream", [False, True])
def test_choices_are_numbered_prompt_by_prompt(client: TestClient, is_stream: bool) -> None:
    answer = ask(client, prompt=["a", "b"], n=2, stream=is_stream, echo=True)
    expected = [f"{p}base answers you ({i}) ünï." for p in "ab" for i in range(2)]

    if is_stream:
        assert texts(answer[:-1], 4) == expected
    else:
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
        assert [c["text"] for c in answer["choices"]] == expected
        assert answer["usage"]["prompt_tokens"] == 4
        assert answer["usage"]["completion_tokens"] == 24


def test_echo_gives_tokens_back_as_text(client: TestClient) -> None:
    body = ask(client, prompt=[104, 105], echo=True)

    assert body["choices"][0]["text"] == "hibase answers you (0) ünï."


def test_logprobs_have_offsets_into_the_text(client: TestClient) -> None:
    logprobs = ask(client, logprobs=1)["choices"][0]["logprobs"]

    assert logprobs["tokens"][:3] == ["base", " answers", " you"]
    assert logprobs["text_offset"][:3] == [0, 4, 12]
    assert logprobs["token_logprobs"][0] == -0.25
    assert logprobs["top_logprobs"][0] == {"t0": -0.5, "base": -0.25}


def test_streamed_offsets_go_on_from_chunk_to_chunk(client: TestClient) -> None:
    *chunks, _ = ask(client, logprobs=0, stream=True)
    whole = ask(client, logprobs=0)["choices"][0]["logprobs"]

    offsets = [o for chunk in chunks for o in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == whole["text_offset"]


def test_a_stream_ends_with_usage_and_done(client: TestClient) -> None:
    *chunks, last, done = ask(client, stream=True, stream_options={"include_usage": True})

    assert done == "[DONE]"
    assert texts(chunks, 1) == ["base answers you (0) ünï."]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert "loriner" in chunks[0]
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 9


def test_token_ids_come_with_each_choice(client: TestClient) -> None:
    choices = ask(client, prompt=["a", "b"], return_token_ids=True)["choices"]

    assert [c["prompt_token_ids"] for c in choices] == [[1, 97], [1, 98]]
    assert choices[0]["token_ids"] == [10, 11, 12, 13, 14, 15]


def test_the_default_is_sixteen_tokens(client: TestClient, service: FakeService) -> None:
    ask(client)

    assert service.calls[0]["sampling"].max_tokens == 16


def test_one_failing_prompt_fails_the_request_and_closes_all(
    client: TestClient, service: FakeService
) -> None:
    service.fail_after, service.fail_with = 0, EngineFailedError("gone")
    response = client.post("/v1/completions", json={"prompt": ["a", "b", "c"]})

    assert response.status_code == 500
    assert len(service.closed) == 3


def test_a_refused_prompt_closes_those_before_it(
    client: TestClient, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = service.generate

    async def full_at_two(*args: Any, **kwargs: Any) -> Any:
        if len(service.open) == 2:
            raise OverloadedError("full")
        return await generate(*args, **kwargs)

    monkeypatch.setattr(service, "generate", full_at_two)
    response = client.post("/v1/completions", json={"prompt": ["a", "b", "c"]})

    assert response.status_code == 429
    assert len(service.closed) == 2
