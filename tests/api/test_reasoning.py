"""Reasoning before an answer: split off the text however it is cut, counted, asked for by effort,
kept apart from tools and grammars, and off where the base's template has no marks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from tokenizers import AddedToken, Tokenizer

from loriner.api.pieces import Content, Piece, Reasoning
from loriner.api.reasoning import Thinking, effort_kwargs, thinking_of
from loriner.engine.grammars import Grammars, Kind
from loriner.errors import InvalidRequestError
from tests.api.fake_service import FakeService
from tests.api.schemas import check, events
from tests.grammars import admits, compiled, open_grammars
from tests.tiny import make_tokenizer

TEMPLATE = "{{ tools }}<tool_call><think></think>{{ enable_thinking }}"
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "f"}}


def read(thinking: Thinking, pieces: list[str]) -> tuple[str, str]:
    """The reasoning and the answer of a text that arrives in these pieces."""
    reader = thinking.reader()
    found: list[Piece] = [piece for text in pieces for piece in reader.feed(text)]
    found += reader.finish()
    return tuple(  # type: ignore[return-value]
        "".join(piece.text for piece in found if isinstance(piece, kind))
        for kind in (Reasoning, Content)
    )


CLOSED, OPEN = (Thinking("<think>", "</think>", is_open) for is_open in (False, True))


@pytest.mark.parametrize(
    ("thinking", "text", "thought", "said"),
    [
        (CLOSED, "<think>\nso <b>\n</think>\n\nYes.", "so <b>", "Yes."),
        (CLOSED, "\n<think>a</think>b", "a", "b"),
        (CLOSED, "<think></think>\n\nYes", "", "Yes"),
        (CLOSED, "Yes. <think>no</think>", "", "Yes. <think>no</think>"),
        (CLOSED, "<thin", "", "<thin"),
        (CLOSED, "<th>x", "", "<th>x"),
        (CLOSED, "", "", ""),
        (CLOSED, "<think>cut </thi", "cut </thi", ""),
        (OPEN, "\nso\n\nthen </ so\n</think>\n\n Yes", "so\n\nthen </ so", " Yes"),
        (OPEN, "a</think>b</think>c", "a", "b</think>c"),
        (OPEN, "cut\n", "cut", ""),
        (OPEN, "</think>", "", ""),
    ],
)
def test_a_text_is_split_the_same_however_it_is_cut(
    thinking: Thinking, text: str, thought: str, said: str
) -> None:
    rng = random.Random(text)
    cuts = [[text], list(text)]
    for _ in range(30):
        places = sorted(rng.sample(range(len(text) + 1), min(4, len(text) + 1)))
        cuts.append([text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)])
    for pieces in cuts:
        assert read(thinking, pieces) == (thought, said), pieces


@pytest.mark.parametrize(
    ("template", "tail", "continued", "is_open"),
    [
        ("{{ messages }}", "assistant\n<think>\n", None, None),
        (TEMPLATE, "assistant\n", None, False),
        (TEMPLATE, "assistant\n<think>\n", None, True),
        (TEMPLATE, "<think>\n\n</think>\n\n", None, None),
        (TEMPLATE, "x", "<think>so", True),
        (TEMPLATE, "x", "<think>so</think>Yes", None),
        (TEMPLATE, "x", "Yes", None),
        ("{{ x }}[THINK][/THINK]", "[THINK]", None, True),
    ],
)
def test_where_reasoning_stands_is_read_off_the_prompt(
    template: str, tail: str, continued: str | None, is_open: bool | None
) -> None:
    found = thinking_of(template, tail, continued=continued, shown=True)

    assert (None if found is None else found.is_open) is is_open


@pytest.mark.parametrize(
    ("template", "effort", "kwargs"),
    [
        (TEMPLATE, None, {}),
        (TEMPLATE, "none", {"enable_thinking": False}),
        ("{{ messages }}", "none", {}),
        ("{{ reasoning_effort }}", "high", {"reasoning_effort": "high"}),
        (TEMPLATE, "high", None),
        ("<think></think>", "none", None),
        ("{{ messages }}", "low", None),
    ],
)
def test_an_effort_is_kept_by_the_template_or_refused(
    template: str, effort: str | None, kwargs: dict[str, Any] | None
) -> None:
    if kwargs is not None:
        assert effort_kwargs(template, effort) == kwargs
        return
    with pytest.raises(InvalidRequestError) as refused:
        effort_kwargs(template, effort)
    assert refused.value.param == "reasoning_effort"


@pytest.fixture
def thinker(service: FakeService) -> FakeService:
    service.chat.template = TEMPLATE
    service.says = ["<think>", "\nLet ", "me", "\n</th", "ink>", "\n\nYes", "."]
    return service


def chat(client: TestClient, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response


def test_a_message_has_its_reasoning_apart_and_counted(
    client: TestClient, thinker: FakeService
) -> None:
    body = chat(client).json()
    check("CreateChatCompletionResponse", body)
    message = body["choices"][0]["message"]

    assert message["content"] == "Yes."
    assert message["reasoning_content"] == message["reasoning"] == "Let me"
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5}
    assert body["usage"]["completion_tokens"] == 7


def test_a_stream_adds_up_to_the_message(client: TestClient, thinker: FakeService) -> None:
    options = {"include_usage": True}
    found = events(chat(client, stream=True, stream_options=options).text)[:-1]
    deltas = [choice["delta"] for event in found for choice in event["choices"]]

    assert "".join(delta.get("content") or "" for delta in deltas) == "Yes."
    for name in ("reasoning_content", "reasoning"):
        assert "".join(delta.get(name, "") for delta in deltas) == "Let me"
    assert found[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5


def test_reasoning_can_be_left_out(client: TestClient, thinker: FakeService) -> None:
    body = chat(client, include_reasoning=False).json()
    assert body["choices"][0]["message"].keys() == {"role", "content", "refusal"}
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5}
    text = chat(client, include_reasoning=False, stream=True).text
    assert "reasoning" not in text and "Let" not in text


def test_without_marks_in_the_template_all_text_is_content(
    client: TestClient, thinker: FakeService
) -> None:
    thinker.chat.template = "{{ messages }}"
    body = chat(client, stream=False).json()
    assert body["choices"][0]["message"]["content"] == "".join(thinker.says or ())
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_an_answer_cut_while_it_thinks_has_no_content(
    client: TestClient, thinker: FakeService
) -> None:
    choice = chat(client, max_tokens=3).json()["choices"][0]

    assert choice["finish_reason"] == "length" and choice["message"]["content"] is None
    assert choice["message"]["reasoning"] == "Let me"


def test_calls_come_after_the_reasoning(client: TestClient, thinker: FakeService) -> None:
    text = f"<think>{CALL}?</think>\n\n{CALL}"
    thinker.says = [text[i : i + 5] for i in range(0, len(text), 5)]
    choice = chat(client, tools=[TOOL]).json()["choices"][0]

    assert choice["message"]["reasoning"] == f"{CALL}?" and choice["message"]["content"] is None
    assert len(choice["message"]["tool_calls"]) == 1 and choice["finish_reason"] == "tool_calls"


def test_a_grammar_begins_after_the_reasoning(client: TestClient, thinker: FakeService) -> None:
    def grammar(**fields: Any) -> str:
        chat(client, **fields)
        return str(thinker.calls[-1]["sampling"].grammar)

    form = {"type": "json_object"}
    assert grammar(response_format=form).startswith('before: (GAP "<think>" thought GAP)?')
    assert grammar(tools=[TOOL], tool_choice="required").startswith("before: (GAP")
    ends = [{"role": "user", "content": "hi<think>\n"}]
    assert grammar(response_format=form, messages=ends).startswith("before: thought GAP\n")
    ends = [{"role": "user", "content": "hi<think>\n\n</think>\n\n"}]
    assert grammar(response_format=form, messages=ends).startswith("json: ")


def test_marks_that_are_special_tokens_are_shown_to_the_reader(
    client: TestClient, thinker: FakeService
) -> None:
    thinker.chat.special_ids = {"<think>": 7, "</think>": 8}
    chat(client, response_format={"type": "json_object"})
    sampling = thinker.calls[-1]["sampling"]

    assert sampling.special_text
    assert "(GAP <[7]> thought GAP)?\nthought: TEXT <[8]>" in sampling.grammar


def test_effort_and_earlier_reasoning_reach_the_template(
    client: TestClient, thinker: FakeService
) -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Yes.", "reasoning": "Let me", "reasoning_content": None},
        {"role": "user", "content": "sure?"},
    ]
    chat(client, messages=turns, reasoning_effort="none")
    rendered = thinker.rendered[-1]

    assert rendered["template_kwargs"] == {"enable_thinking": False}
    assert rendered["messages"][1]["reasoning_content"] == "Let me"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"include_reasoning": 1}, "include_reasoning"),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            "chat_template_kwargs",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "reasoning": "y"}]},
            "messages[0].reasoning",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(
    client: TestClient, thinker: FakeService, fields: dict[str, Any], param: str
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    refused = client.post("/v1/chat/completions", json=body)

    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


@pytest.mark.clients("openai")
def test_a_response_has_its_reasoning_as_an_item_that_can_be_sent_back(
    client: TestClient, thinker: FakeService
) -> None:
    from openai.types.responses import Response, ResponseStreamEvent
    from pydantic import TypeAdapter

    body = client.post("/v1/responses", json={"input": "hi"}).json()
    TypeAdapter(Response).validate_python(body)
    thought, message = body["output"]
    assert (thought["type"], thought["content"]) == (
        "reasoning",
        [{"type": "reasoning_text", "text": "Let me"}],
    )
    assert message["content"][0]["text"] == "Yes."
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": 5}
    text = client.post("/v1/responses", json={"input": "hi", "stream": True}).text
    told = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: ")]
    for event in told:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
    deltas = [e["delta"] for e in told if e["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == "Let me"

    hi, again = ({"role": "user", "content": text} for text in ("hi", "?"))
    history = [hi, thought, message, again]
    asked = {"input": history, "reasoning": {"effort": "none"}}
    assert client.post("/v1/responses", json=asked).status_code == 200
    assert thinker.rendered[-1]["messages"][1] == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "Let me",
    }
    asked = {"input": "hi", "reasoning": {"effort": "high"}}
    refused = client.post("/v1/responses", json=asked).json()["error"]
    assert refused["param"] == "reasoning.effort"


@pytest.fixture(scope="module", params=["text", "tokens"])
def marked(request: pytest.FixtureRequest) -> Iterator[tuple[Grammars, Tokenizer]]:
    """Marks that the tokenizer spells, and marks that are tokens without being special, as Qwen 3
    and R1 have them."""
    tokenizer = make_tokenizer()
    if request.param == "tokens":
        marks = ("<think>", "</think>")
        tokenizer.add_tokens([AddedToken(m, special=False, normalized=False) for m in marks])
    with open_grammars(tokenizer) as grammars:
        yield grammars, tokenizer


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        (Kind.JSON, '{"type": "integer"}', "12"),
        (Kind.REGEX, "a|b+", "bbb"),
        (Kind.CHOICE, '["yes", "no"]', "no"),
        (Kind.GRAMMAR, 'start: "a" start | "b"', "aab"),
    ],
)
def test_every_kind_of_grammar_lets_the_model_think_first(
    marked: tuple[Grammars, Tokenizer], kind: Kind, text: str, answer: str
) -> None:
    grammars, tokenizer = marked

    def spell(mark: str) -> str:
        token = tokenizer.token_to_id(mark)
        return json.dumps(mark) if token is None else f"<[{token}]>"

    def fits(thinking: Thinking, said: str) -> bool:
        grammar = compiled(grammars, kind, text, before=thinking.grammar(spell))
        return admits(grammar, said, tokenizer)

    thought = f"so {answer} <b>\n</think>\n\n"
    assert fits(OPEN, thought + answer) and not fits(OPEN, answer)
    assert not fits(OPEN, thought + answer + "?")
    assert fits(CLOSED, f"<think>\n{thought}{answer}") and fits(CLOSED, answer)
    assert not fits(CLOSED, thought + answer)
