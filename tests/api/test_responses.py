"""/v1/responses with the fake service: what the chat becomes, what the caller gets, what is
refused. OpenAI's own types read every answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from loriner.api.response_body import ResponseBody
from loriner.api.unserved import RESPONSES
from loriner.errors import ContextLengthError, EngineFailedError
from tests.api.fake_service import FakeService

pytestmark = pytest.mark.clients("openai")

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "get_weather", "parameters": CITY}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
SAID = "base answers you (0) ünï."


def respond(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/responses", json={"input": "hi", **fields})


def answer(client: TestClient, **fields: Any) -> dict[str, Any]:
    from openai.types.responses import Response

    response = respond(client, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    TypeAdapter(Response).validate_python(body)
    return body


def told(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, each one that OpenAI knows, in their order."""
    from openai.types.responses import ResponseStreamEvent

    text = respond(client, stream=True, **fields).text
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        TypeAdapter(ResponseStreamEvent).validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_a_text_is_answered_and_nothing_stored(client: TestClient) -> None:
    body = answer(client)

    assert body["id"].startswith("resp_") and body["object"] == "response"
    assert (body["status"], body["error"], body["incomplete_details"]) == ("completed", None, None)
    assert body["store"] is False and body["previous_response_id"] is None
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [
        {"type": "output_text", "text": SAID, "annotations": [], "logprobs": []}
    ]
    assert body["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 9,
    }
    assert body["loriner"]["generation"] is None


def test_a_stream_adds_up_to_the_whole(client: TestClient) -> None:
    events = told(client)
    kinds = [event["type"].removeprefix("response.") for event in events]

    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[4:-4] == ["output_text.delta"] * 6
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert "".join(event["delta"] for event in events[4:-4]) == SAID == events[-4]["text"]
    assert events[2]["item"]["content"] == [] and events[3]["part"]["text"] == ""
    assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    whole = answer(client)
    for body in (whole, last := events[-1]["response"]):
        for name in ("id", "created_at", "completed_at"):
            body.pop(name)
        body["output"][0].pop("id")
    assert last == whole


def test_items_become_the_turns_of_a_chat(client: TestClient, service: FakeService) -> None:
    answer(
        client,
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "In French."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Ça?"}]},
            {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [
                    {"type": "output_text", "text": "Oui", "annotations": []},
                    {"type": "refusal", "refusal": "Non"},
                ],
            },
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"x": 1}'},
            {"type": "function_call", "call_id": "b", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "1"},
            {
                "type": "function_call_output",
                "call_id": "b",
                "output": [{"type": "input_text", "text": "2"}],
            },
        ],
    )

    def call(name: str, call_id: str, arguments: dict[str, int]) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        return {"id": call_id, "type": "function", "function": function}

    assert service.rendered[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "In French."},
        {"role": "user", "content": "Ça?"},
        {
            "role": "assistant",
            "content": "Oui\nNon",
            "tool_calls": [call("f", "a", {"x": 1}), call("g", "b", {})],
        },
        {"role": "tool", "content": "1", "tool_call_id": "a"},
        {"role": "tool", "content": "2", "tool_call_id": "b"},
    ]


def test_sampling_and_the_adapter_are_as_chat_has_them(
    client: TestClient, service: FakeService
) -> None:
    fields = {"max_output_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["x"]}
    body = answer(client, adapter="pirate", metadata={"a": "b"}, user="u", **fields)
    chat = {**fields, "max_tokens": fields["max_output_tokens"]}
    del chat["max_output_tokens"]
    messages = [{"role": "user", "content": "hi"}]
    client.post("/v1/chat/completions", json={"messages": messages, "model": "pirate", **chat})

    ours, theirs = service.calls
    assert ours["sampling"] == theirs["sampling"] and ours["adapter"] == theirs["adapter"]
    assert (body["status"], body["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    assert body["model"] == "pirate" and body["metadata"] == {"a": "b"} and body["user"] == "u"
    assert body["output"][0]["status"] == "incomplete" and body["max_output_tokens"] == 3
    assert told(client, max_output_tokens=3)[-1]["type"] == "response.incomplete"


@pytest.mark.parametrize("size", [3, 1000])
def test_calls_are_items_of_their_own(client: TestClient, service: FakeService, size: int) -> None:
    text = f"Let me look. {CALL}"
    service.says = [text[i : i + size] for i in range(0, len(text), size)]
    body = answer(client, tools=[WEATHER])
    message, call = body["output"]

    assert message["content"][0]["text"] == "Let me look."
    assert (call["type"], call["name"], call["status"]) == (
        "function_call",
        "get_weather",
        "completed",
    )
    assert call["arguments"] == '{"city": "Paris"}' and call["call_id"] != call["id"]
    assert body["status"] == "completed"
    assert body["tools"] == [{**WEATHER, "strict": False}]
    events = told(client, tools=[WEATHER])
    deltas = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    done = [e for e in events if e["type"] == "response.function_call_arguments.done"]
    assert "".join(deltas) == done[0]["arguments"] == call["arguments"]
    (added,) = [
        e for e in events if e["type"] == "response.output_item.added" and e["output_index"] == 1
    ]
    assert added["item"]["name"] == "get_weather" and added["item"]["arguments"] == ""


def test_tool_choice_is_kept_as_chat_keeps_it(client: TestClient, service: FakeService) -> None:
    service.says = [CALL]
    answer(client, tools=[WEATHER], tool_choice="required")
    assert "get_weather" in (service.calls[-1]["sampling"].grammar or "")
    named = {"type": "function", "name": "get_weather"}
    body = answer(client, tools=[WEATHER], tool_choice=named)
    assert body["tool_choice"] == named
    answer(client, tools=[WEATHER], tool_choice="none")
    assert service.rendered[-1]["tools"] is None


def test_a_schema_is_kept(client: TestClient, service: FakeService) -> None:
    form = {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}
    body = answer(client, text={"format": form})

    assert service.calls[0]["sampling"].grammar == f"json: {json.dumps(CITY)}"
    assert body["text"]["format"] == form
    assert answer(client)["text"]["format"] == {"type": "text"}
    answer(client, text={"format": {"type": "json_object"}})
    assert "object" in service.calls[-1]["sampling"].grammar


def test_an_answer_of_nothing_is_an_empty_message(client: TestClient, service: FakeService) -> None:
    service.says = [""]

    assert answer(client)["output"][0]["content"][0]["text"] == ""


def test_a_failure_in_the_stream_is_its_last_event(
    client: TestClient, service: FakeService
) -> None:
    service.fail_after, service.fail_with = 2, EngineFailedError("gone")
    last = told(client)[-1]

    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    assert "gone" not in json.dumps(last)


ITEM = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "[1"}
IMAGE = {"type": "input_image", "image_url": "data:"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input[0].content[0].text",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": "a"}, ITEM]}, "input[1].arguments"),
        ({"instructions": ["x"]}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3.0}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"bad": 1}}}},
            "text.format.schema",
        ),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"shape": 1}}, "text.shape"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        (
            {
                "tools": [{"type": "function", "name": "f", "parameters": {"bad": 1}}],
                "tool_choice": "required",
            },
            "tools[0].parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}},
            "tool_choice.name",
        ),
        ({"tools": [WEATHER], "text": {"format": {"type": "json_object"}}}, "tools"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"reasoning": {"depth": 1}}, "reasoning.depth"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"input": [{"type": "reasoning", "summary": [{}]}]}, "input[0].summary"),
        (
            {"input": [{"type": "reasoning", "encrypted_content": "x"}]},
            "input[0].encrypted_content",
        ),
        ({"messages": []}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"response_format": {"type": "text"}}, "response_format"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"adapter": [{"name": "pirate", "scale": 1e9}]}, "adapter[0].scale"),
    ],
)
def test_a_bad_response_is_400_and_names_its_field(
    client: TestClient, service: FakeService, fields: dict[str, Any], param: str
) -> None:
    refused = respond(client, **fields)

    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text
    assert service.calls == []


def test_what_asks_for_nothing_is_let_through(client: TestClient) -> None:
    fields: dict[str, Any] = {"store": False, "background": False, "include": [], "n": 1}
    fields |= {"truncation": "disabled", "service_tier": "auto", "prompt_cache_key": "k"}
    fields |= {"previous_response_id": None, "text": {"format": None, "verbosity": "medium"}}

    assert answer(client, **fields)["prompt_cache_key"] == "k"


def test_the_engines_refusals_name_fields_of_this_body(
    client: TestClient, service: FakeService
) -> None:
    for chats, ours in (("messages", "input"), ("max_tokens", "max_output_tokens")):
        service.refuse = ContextLengthError(f"{chats} is too long.", chats)
        for stream in (False, True):
            refused = respond(client, stream=stream)
            error = refused.json()["error"]
            assert (refused.status_code, error["param"]) == (400, ours)
            assert error["message"] == f"{ours} is too long."


def test_an_unknown_adapter_is_404(client: TestClient) -> None:
    assert respond(client, adapter="nobody").json()["error"]["param"] == "adapter"
    assert respond(client, model="nobody").status_code == 404


@pytest.fixture
def openai(live: Any) -> Iterator[Any]:
    from openai import OpenAI

    with OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client:
        yield client


def test_openais_client_asks_and_reads(openai: Any) -> None:
    whole = openai.responses.create(model="tiny", input="hi", extra_body={"adapter": "pirate"})
    pieces = openai.responses.create(model="pirate", input="hi", stream=True)

    assert whole.output_text == "pirate answers you (0) ünï." and whole.store is False
    assert "".join(e.delta for e in pieces if e.type == "response.output_text.delta") == (
        whole.output_text
    )


def test_openais_stream_helper_accumulates(openai: Any, service: FakeService) -> None:
    service.says = ["Let me look. ", CALL[:50], CALL[50:]]
    with openai.responses.stream(model="tiny", input="hi", tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()

    message, call = final.output
    assert message.content[0].text == "Let me look."
    assert call.parsed_arguments is None or call.parsed_arguments == {"city": "Paris"}
    assert json.loads(call.arguments) == {"city": "Paris"}


def test_openais_client_parses_a_structured_answer(openai: Any, service: FakeService) -> None:
    from pydantic import BaseModel

    class City(BaseModel):
        city: str

    service.says = ['{"city": ', '"Paris"}']
    whole = openai.responses.parse(model="tiny", input="hi", text_format=City)
    with openai.responses.stream(model="tiny", input="hi", text_format=City) as stream:
        final = stream.get_final_response()

    assert whole.output_parsed == City(city="Paris") == final.output_parsed


def test_openais_client_carries_a_conversation_on(openai: Any, service: FakeService) -> None:
    service.says = [CALL]
    first = openai.responses.create(model="tiny", input="hi", tools=[WEATHER])
    history = [{"role": "user", "content": "hi"}, *first.output]
    (call,) = first.output
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    service.says = ["Sunny."]
    second = openai.responses.create(model="tiny", input=history, tools=[WEATHER])

    assert second.output_text == "Sunny."
    roles = [turn["role"] for turn in service.rendered[-1]["messages"]]
    assert roles == ["user", "assistant", "tool"]


HARMLESS = {"service_tier", "prompt_cache_options", "prompt_cache_retention"}


def test_every_parameter_of_openais_client_is_served_refused_or_harmless() -> None:
    from openai.types.responses.response_create_params import ResponseCreateParamsBase

    for name in {*ResponseCreateParamsBase.__annotations__, "stream"}:
        places = (ResponseBody.model_fields, RESPONSES, HARMLESS)
        assert sum(name in place for place in places) == 1, name
