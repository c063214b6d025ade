"""Tools over HTTP: what the prompt is told, what the engine must keep, what the caller gets."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.api.fake_service import FakeService
from tests.api.schemas import check, events

HI = [{"role": "user", "content": "hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str, **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


WEATHER = tool("get_weather", description="Weather now", parameters=CITY)
TIME = tool("get_time")
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


def post(client: TestClient, **fields: Any) -> Any:
    body = {"messages": HI, "tools": [WEATHER, TIME], **fields}
    return client.post("/v1/chat/completions", json=body)


def grammar_of(service: FakeService) -> str | None:
    grammar = service.calls[-1]["sampling"].grammar
    assert grammar is None or isinstance(grammar, str)
    return grammar


def called(message: Any) -> list[tuple[str, str]]:
    calls = message.get("tool_calls", [])
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def added_up(text: str) -> tuple[str, list[dict[str, str]], str]:
    """A stream's content, calls and finish_reason, as OpenAI's client adds them up."""
    content, calls, reasons = "", [], []
    for event in events(text)[:-1]:
        check("CreateChatCompletionStreamResponse", event)
        for choice in event["choices"]:
            content += choice["delta"].get("content") or ""
            for piece in choice["delta"].get("tool_calls", []):
                if piece["index"] == len(calls):
                    assert piece["type"] == "function" and piece["id"]
                    calls.append({"name": piece["function"]["name"], "arguments": ""})
                else:
                    assert "name" not in piece["function"] and "id" not in piece
                calls[piece["index"]]["arguments"] += piece["function"]["arguments"]
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    (reason,) = reasons
    return content, calls, reason


def test_tools_reach_the_template(client: TestClient, service: FakeService) -> None:
    assert post(client).status_code == 200
    (first, second) = service.rendered[0]["tools"]

    assert first["function"] == {
        "name": "get_weather",
        "description": "Weather now",
        "parameters": CITY,
    }
    assert second["function"]["parameters"]["additionalProperties"] is False
    assert grammar_of(service) is None


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": []}])
def test_without_a_choice_to_call_there_are_no_tools(
    client: TestClient, service: FakeService, fields: dict[str, Any]
) -> None:
    service.says = [CALL]
    answer = post(client, **fields).json()["choices"][0]

    assert service.rendered[0]["tools"] is None
    assert answer["message"]["content"] == CALL and "tool_calls" not in answer["message"]
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize("size", [2, 3, 1000])
def test_calls_are_given_as_openai_gives_them(
    client: TestClient, service: FakeService, size: int
) -> None:
    text = f"Let me look. {CALL}\n{OTHER}"
    service.says = [text[i : i + size] for i in range(0, len(text), size)]
    body = post(client).json()
    check("CreateChatCompletionResponse", body)
    (choice,) = body["choices"]
    expected = [("get_weather", '{"city": "Paris"}'), ("get_time", "{}")]

    assert called(choice["message"]) == expected
    assert choice["message"]["content"] == "Let me look."
    assert choice["finish_reason"] == "tool_calls"
    ids = {call["id"] for call in choice["message"]["tool_calls"]}
    assert len(ids) == 2 and all(one.startswith("call_") for one in ids)
    content, calls, reason = added_up(post(client, stream=True).text)
    assert (content, reason) == ("Let me look.", "tool_calls")
    assert [(call["name"], call["arguments"]) for call in calls] == expected


def test_a_call_alone_has_no_content(client: TestClient, service: FakeService) -> None:
    service.says = [CALL]
    message = post(client).json()["choices"][0]["message"]

    assert message["content"] is None and len(message["tool_calls"]) == 1


def test_text_alone_has_no_calls(client: TestClient) -> None:
    choice = post(client).json()["choices"][0]

    assert choice["message"]["content"] == "base answers you (0) ünï."
    assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "stop"
    assert added_up(post(client, stream=True).text)[0] == "base answers you (0) ünï."


def test_a_cut_call_ends_with_length_and_what_there_is(
    client: TestClient, service: FakeService
) -> None:
    service.says = [CALL[:58], CALL[58:-13], CALL[-13:]]
    choice = post(client, max_tokens=1).json()["choices"][0]

    assert choice["finish_reason"] == "length"
    assert called(choice["message"]) == [("get_weather", CALL[:58].partition('arguments": ')[2])]
    content, calls, reason = added_up(post(client, max_tokens=1, stream=True).text)
    assert (content, len(calls), reason) == ("", 1, "length")


def test_one_call_at_a_time_when_asked(client: TestClient, service: FakeService) -> None:
    service.says = [f"{CALL}\n{OTHER}"]
    choice = post(client, parallel_tool_calls=False).json()["choices"][0]

    assert [name for name, _ in called(choice["message"])] == ["get_weather"]


def test_choices_call_for_themselves(client: TestClient, service: FakeService) -> None:
    service.says = [CALL]
    choices = post(client, n=3).json()["choices"]

    assert all(len(choice["message"]["tool_calls"]) == 1 for choice in choices)


def test_a_required_call_is_written_under_a_grammar(
    client: TestClient, service: FakeService
) -> None:
    service.says = [CALL]
    choice = post(client, tool_choice="required").json()["choices"][0]
    grammar = grammar_of(service) or ""

    assert choice["finish_reason"] == "tool_calls"
    assert "get_weather" in grammar and "get_time" in grammar and ")*" in grammar
    assert post(client, tool_choice="required", parallel_tool_calls=False).status_code == 200
    assert ")*" not in (grammar_of(service) or "")


def test_a_named_function_is_the_only_one(client: TestClient, service: FakeService) -> None:
    service.says = [OTHER]
    choice = post(client, tool_choice=tool("get_time")).json()["choices"][0]
    grammar = grammar_of(service) or ""

    assert called(choice["message"]) == [("get_time", "{}")]
    assert choice["finish_reason"] == "stop"  # as OpenAI has it for a named one
    assert "get_time" in grammar and "get_weather" not in grammar
    assert len(service.rendered[0]["tools"]) == 2


def test_a_strict_function_has_a_grammar_even_when_text_will_do(
    client: TestClient, service: FakeService
) -> None:
    strict = tool("f", strict=True, parameters=CITY)
    assert post(client, tools=[strict]).status_code == 200
    assert "TEXT" in (grammar_of(service) or "")


def test_a_special_mark_is_shown_to_the_reader(client: TestClient, service: FakeService) -> None:
    service.chat.template = "{{ tools }}[TOOL_CALLS]"
    service.chat.special_ids = {"[TOOL_CALLS]": 5}
    service.says = ['[TOOL_CALLS][{"name": "get_time", "arguments": {}}]']
    choice = post(client, tool_choice="required").json()["choices"][0]

    assert service.calls[-1]["sampling"].special_text
    assert "<[5]>" in (grammar_of(service) or "")
    assert len(choice["message"]["tool_calls"][0]["id"]) == 9


def test_a_template_without_tools_is_told_in_words(
    client: TestClient, service: FakeService
) -> None:
    service.chat.template = "{{ messages }}"
    service.says = [CALL]
    history = [
        {"role": "system", "content": "Be brief."},
        *HI,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [tool("get_time", arguments='{"a": 1}') | {"id": "c"}],
        },
        {"role": "tool", "content": "12:00", "tool_call_id": "c"},
        {"role": "tool", "content": "noon", "tool_call_id": "d"},
    ]
    choice = post(client, messages=history).json()["choices"][0]
    rendered = service.rendered[0]
    system, _, assistant, result = rendered["messages"]

    assert rendered["tools"] is None and len(choice["message"]["tool_calls"]) == 1
    assert system["content"].startswith("Be brief.\n\n# Tools")
    assert json.dumps(CITY) in system["content"] and "<tool_call>" in system["content"]
    call = '<tool_call>\n{"name": "get_time", "arguments": {"a": 1}}\n</tool_call>'
    assert assistant == {"role": "assistant", "content": call}
    results = [f"<tool_response>\n{one}\n</tool_response>" for one in ("12:00", "noon")]
    assert result == {"role": "user", "content": "\n".join(results)}


def test_a_template_without_a_system_is_told_by_the_user(
    client: TestClient, service: FakeService
) -> None:
    service.chat.template = "{{ raise_exception('System role not supported') }}"
    assert post(client).status_code == 200
    (turn,) = service.rendered[0]["messages"]
    assert turn["role"] == "user" and turn["content"].startswith("# Tools")
    assert turn["content"].endswith("\n\nhi")


@pytest.mark.parametrize("template", ["{{ tools }}<tool_call><function=", "{{ tools }}<|tool|>"])
def test_a_template_that_calls_in_another_way_is_refused_unless_overruled(
    client: TestClient, service: FakeService, template: str
) -> None:
    service.chat.template = template
    assert post(client).json()["error"]["param"] == "tools"
    assert post(client, tools=[]).status_code == 200
    service.tool_format = "hermes"
    assert post(client).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [tool("")]}, "tools[0].function.name"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [TIME, TIME]}, "tools[1].function.name"),
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": tool("nobody")}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        (
            {"tools": [tool("f", parameters={"bad": 1})], "tool_choice": "required"},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: TestClient, service: FakeService, fields: dict[str, Any], param: str
) -> None:
    error = post(client, **fields).json()["error"]

    assert (error["param"] or "").startswith(param), error
    assert service.calls == []
