"""Log-probabilities of the prompt: `prompt_logprobs` in vLLM's shape, `echo` with logprobs in
OpenAI's; whole and streamed, for many prompts and choices."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.api.fake_service import FakeService
from tests.api.schemas import events

HI = [{"role": "user", "content": "hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def ask(client: TestClient, path: str = TEXT, **fields: Any) -> Any:
    asked = {"messages": HI} if path == CHAT else {"prompt": "hi"}
    response = client.post(path, json={**asked, **fields})
    assert response.status_code == 200, response.text
    return events(response.text)[:-1] if fields.get("stream") else response.json()


def of(ids: list[int], num_top: int) -> list[Any]:
    """In vLLM's shape, what the fake says of these tokens."""
    likeliest = {
        str(20 + i): {"logprob": -0.5 - i, "rank": 1 + i, "decoded_token": f"t{i}"}
        for i in range(num_top)
    }
    own = [{str(i): {"logprob": -3.0, "rank": 3, "decoded_token": chr(i)}} for i in ids]
    return [None, *({**entry, **likeliest} for entry in own[1:])]


def test_a_chat_tells_what_its_prompt_was(client: TestClient, service: FakeService) -> None:
    body = ask(client, CHAT, prompt_logprobs=2)

    assert body["prompt_logprobs"] == of([1, 104, 105], 2)
    assert next(iter(body["prompt_logprobs"][1])) == "104", "the prompt's own token comes first"
    assert service.calls[0]["sampling"].prompt_logprobs == 2
    assert "prompt_logprobs" not in ask(client, CHAT)


def test_a_streamed_chat_tells_it_first(client: TestClient) -> None:
    first, *others = ask(client, CHAT, prompt_logprobs=0, stream=True, n=2)

    assert first["prompt_logprobs"] == of([1, 104, 105], 0)
    assert not any("prompt_logprobs" in chunk for chunk in others)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_each_choice_tells_of_its_own_prompt(
    client: TestClient, is_stream: bool, logprobs: int | None
) -> None:
    more = {} if logprobs is None else {"logprobs": logprobs}
    answer = ask(client, prompt=[[5, 6], [7]], n=2, prompt_logprobs=1, stream=is_stream, **more)

    found: dict[int, list[Any]] = {}
    for chunk in answer if is_stream else [answer]:
        for choice in chunk["choices"]:
            if "prompt_logprobs" in choice:
                found.setdefault(choice["index"], []).append(choice["prompt_logprobs"])
    assert found == {0: [of([5, 6], 1)], 1: [of([5, 6], 1)], 2: [[None]], 3: [[None]]}


def test_echo_has_the_prompts_logprobs_before_the_answers(client: TestClient) -> None:
    (choice,) = ask(client, prompt="hi", echo=True, logprobs=1)["choices"]
    logprobs = choice["logprobs"]

    assert choice["text"] == "hibase answers you (0) ünï."
    assert logprobs["tokens"][:5] == ["\x01", "h", "i", "base", " answers"]
    assert logprobs["token_logprobs"][:4] == [None, -3.0, -3.0, -0.25]
    assert logprobs["top_logprobs"][:2] == [None, {"t0": -0.5, "h": -3.0}]
    assert logprobs["text_offset"][:5] == [0, 0, 1, 2, 6]
    assert "prompt_logprobs" not in choice
    text = choice["text"]
    for token, start in zip(logprobs["tokens"][1:], logprobs["text_offset"][1:], strict=True):
        assert text[start:].startswith(token)


@pytest.mark.parametrize("fields", [{"logprobs": 2}, {"logprobs": 0, "prompt_logprobs": 3}])
def test_a_streamed_echo_adds_up_to_the_whole_one(
    client: TestClient, fields: dict[str, Any]
) -> None:
    asked = {"prompt": ["hi", [5, 6, 7]], "n": 2, "echo": True, **fields}
    whole = ask(client, **asked)["choices"]
    streamed = [{"text": "", "logprobs": {}} for _ in whole]
    chunks = ask(client, **asked, stream=True)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        made = streamed[choice["index"]]
        made["text"] += choice["text"]
        for name, values in choice["logprobs"].items():
            made["logprobs"].setdefault(name, []).extend(values)
        if "prompt_logprobs" in choice:
            made["prompt_logprobs"] = choice["prompt_logprobs"]

    assert "loriner" in chunks[0]
    for made, choice in zip(streamed, whole, strict=True):
        assert {name: choice[name] for name in made} == made
        assert len(choice["logprobs"]["top_logprobs"][1]) == fields["logprobs"] + 1


def test_the_larger_of_both_is_computed_and_each_gets_its_own(
    client: TestClient, service: FakeService
) -> None:
    (choice,) = ask(client, echo=True, logprobs=1, prompt_logprobs=3)["choices"]

    assert service.calls[0]["sampling"].prompt_logprobs == 3
    assert choice["prompt_logprobs"] == of([1, 104, 105], 3)
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:3]] == [2, 2]


def test_echo_alone_asks_for_no_logprobs(client: TestClient, service: FakeService) -> None:
    ask(client, echo=True)
    assert service.calls[0]["sampling"].prompt_logprobs is None


SCORED: list[tuple[str, dict[str, Any]]] = [
    (TEXT, {"echo": True, "logprobs": 1}),
    (TEXT, {"echo": True}),
    (TEXT, {"prompt_logprobs": 1}),
    (CHAT, {"prompt_logprobs": 1}),
]


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize("is_stream", [False, True])
def test_tokens_may_be_named_by_their_ids(client: TestClient, path: str, is_stream: bool) -> None:
    more = {"logprobs": True, "top_logprobs": 1} if path == CHAT else {"logprobs": 1, "echo": True}
    answers = []
    for by_id in (False, True):
        asked = {"return_tokens_as_token_ids": by_id, "stream": is_stream, **more}
        answer = ask(client, path, **asked)
        chunks = answer if is_stream else [answer]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        answers.append([one["logprobs"] for one in choices if one.get("logprobs")])
    for plain, by_id in zip(*answers, strict=True):
        if path == CHAT:
            for one in by_id["content"]:
                (top,) = one["top_logprobs"]
                assert (one["token"], top["token"]) == ("token_id:10", "token_id:20")
                assert bytes(top["bytes"]) == b"token_id:20"
            assert len(plain["content"]) == len(by_id["content"])
        else:
            assert all(re.fullmatch("token_id:[0-9]+", token) for token in by_id["tokens"])
            assert by_id["text_offset"] == plain["text_offset"]
            tops = [one for one in by_id["top_logprobs"] if one is not None]
            assert [next(iter(one)) for one in tops] == by_id["tokens"][-len(tops) :]


@pytest.mark.parametrize(("path", "fields"), SCORED)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_prompt_may_be_read_and_nothing_generated(
    client: TestClient, path: str, fields: dict[str, Any], is_stream: bool
) -> None:
    more = {"stream": True, "stream_options": {"include_usage": True}} if is_stream else {}
    answer = ask(client, path, max_tokens=0, n=2, **fields, **more)
    chunks = answer if is_stream else [answer]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    said = [choice.get("delta") or choice.get("message") or choice for choice in choices]
    texts = [one.get("text") or one.get("content") or "" for one in said]

    assert "".join(texts) == ("hi" * 2 if "echo" in fields else "")
    assert [choice["finish_reason"] for choice in choices].count("length") == 2
    usage = chunks[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 0)
    told = [one for one in (*chunks, *choices) if "prompt_logprobs" in one]
    if "prompt_logprobs" in fields:
        assert all(one["prompt_logprobs"] == of([1, 104, 105], 1) for one in told) and told
    scores = [one["logprobs"]["token_logprobs"] for one in choices if "logprobs" in fields]
    assert scores == [[None, -3.0, -3.0]] * len(scores)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (TEXT, {}, "max_tokens"),
        (TEXT, {"logprobs": 1}, "max_tokens"),
        (CHAT, {}, "max_tokens"),
        (CHAT, {"logprobs": True}, "max_tokens"),
        (CHAT, {"echo": True}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 0, "max_tokens": None}, "max_completion_tokens"),
        (TEXT, {"prompt_logprobs": 1, "min_tokens": 1}, "min_tokens"),
    ],
)
def test_no_tokens_of_nothing_are_refused(
    client: TestClient, path: str, fields: dict[str, Any], param: str
) -> None:
    asked = {"messages": HI} if path == CHAT else {"prompt": "hi"}
    refused = client.post(path, json={**asked, "max_tokens": 0, **fields})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_nothing_that_json_lacks_is_written(client: TestClient) -> None:
    body = ask(client, echo=True, logprobs=1, prompt_logprobs=1)
    json.dumps(body, allow_nan=False)
