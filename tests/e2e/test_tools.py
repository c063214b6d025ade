"""The openai package calls tools and parses structured answers on a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from jsonschema import validate

from tests.e2e.kit import Kit
from tests.servers import ServerProcess

pytestmark = pytest.mark.clients("openai")

HI: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "get_time"}},
]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def openai(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    from openai import OpenAI

    kit: Kit = request.getfixturevalue("kit")
    base: Path = kit.base if request.param == "tiny" else request.getfixturevalue("smollm2")
    with (
        ServerProcess(
            base, tmp_path_factory.mktemp("tools") / "store", "--served-name", "b"
        ) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        yield client


def check(call: Any) -> None:
    """Arguments fit the function's schema."""
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        validate(arguments, CITY)
    else:
        assert call.function.name == "get_time" and arguments == {}


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_is_made(openai: Any, seed: int) -> None:
    answer = openai.chat.completions.create(
        model="b", messages=HI, tools=TOOLS, tool_choice="required", seed=seed, max_tokens=400
    )
    (choice,) = answer.choices
    assert choice.finish_reason in ("tool_calls", "length") and choice.message.content is None
    calls = choice.message.tool_calls
    cut = choice.finish_reason == "length"  # a random base may call without end
    for call in calls[: len(calls) - cut]:
        check(call)


def test_a_named_function_is_called_and_answered(openai: Any) -> None:
    create = openai.chat.completions.create
    answer = create(model="b", messages=HI, tools=TOOLS, tool_choice=NAMED, temperature=0)
    (call,) = answer.choices[0].message.tool_calls
    check(call)
    result = {"role": "tool", "content": "20", "tool_call_id": call.id}
    history = [*HI, answer.choices[0].message, result]
    after = create(model="b", messages=history, tools=TOOLS, temperature=0, max_tokens=8)
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens


def test_a_streamed_call_adds_up_to_the_whole_one(openai: Any) -> None:
    fields = {
        "model": "b",
        "messages": HI,
        "tools": TOOLS,
        "tool_choice": NAMED,
        "temperature": 0,
    }
    whole = openai.chat.completions.create(**fields).choices[0].message.tool_calls[0]
    with openai.chat.completions.stream(**fields) as stream:
        for _ in stream:
            pass
        (call,) = stream.get_final_completion().choices[0].message.tool_calls

    assert call.function.name == whole.function.name == "get_weather"
    assert call.function.arguments == whole.function.arguments


def test_a_structured_answer_is_parsed(openai: Any) -> None:
    from pydantic import BaseModel

    class Answer(BaseModel):
        unit: Literal["C", "F"]
        sure: bool

    fields = {"model": "b", "messages": HI, "response_format": Answer, "temperature": 0}
    parsed = openai.chat.completions.parse(**fields).choices[0].message.parsed
    with openai.chat.completions.stream(**fields) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0].message.parsed

    assert isinstance(parsed, Answer) and streamed == parsed


def test_a_response_keeps_its_schema_and_streams_the_same(openai: Any) -> None:
    from pydantic import BaseModel

    class Answer(BaseModel):
        unit: Literal["C", "F"]
        sure: bool

    fields = {"model": "b", "input": "Which unit?", "text_format": Answer, "temperature": 0}
    whole = openai.responses.parse(**fields)
    with openai.responses.stream(**fields) as stream:
        streamed = stream.get_final_response()

    assert isinstance(whole.output_parsed, Answer)
    assert streamed.output_parsed == whole.output_parsed
    assert streamed.usage.output_tokens == whole.usage.output_tokens > 0


def test_a_response_calls_a_function(openai: Any) -> None:
    function = {"type": "function", "name": "get_weather", "parameters": CITY}
    named = {"type": "function", "name": "get_weather"}
    answer = openai.responses.create(
        model="b", input="Paris?", tools=[function], tool_choice=named, temperature=0
    )
    (call,) = answer.output
    validate(json.loads(call.arguments), CITY)


def test_a_strict_function_may_be_called_or_not(openai: Any) -> None:
    from openai import pydantic_function_tool
    from pydantic import BaseModel

    class Weather(BaseModel):
        city: Literal["Paris", "London"]

    tools = [pydantic_function_tool(Weather)]
    for seed in range(4):
        answer = openai.chat.completions.create(
            model="b", messages=HI, tools=tools, seed=seed, max_tokens=60
        )
        for call in answer.choices[0].message.tool_calls or []:
            if answer.choices[0].finish_reason == "tool_calls":
                Weather.model_validate_json(call.function.arguments)
