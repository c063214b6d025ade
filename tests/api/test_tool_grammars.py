"""What the grammars of tool calls admit, the readers of their formats read."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from jsonschema import validate
from llguidance import LLMatcher

from loriner.api.pieces import Arguments, Call, Content
from loriner.api.tool_formats import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, ToolFormat
from loriner.api.tool_reader import ToolReader
from loriner.api.tool_schema import NamedTool, Tool, ToolUse, tool_use
from loriner.engine.grammars import Grammars, Kind
from tests.grammars import compiled, matcher_of, next_ids
from tests.tiny import IM_END, IM_START

FORMATS = [HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS]
PARAMETERS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Paris", 'Q"}{', "東京"]}},
    },
    "get.time-2": {"type": "object", "properties": {}, "additionalProperties": False},
}


def use_of(choice: Any, parallel: bool = True, *, strict: bool = False) -> ToolUse:
    functions = [
        {"name": name, "parameters": schema, "strict": strict}
        for name, schema in PARAMETERS.items()
    ]
    tools = [Tool(type="function", function=one) for one in functions]  # type: ignore[arg-type]
    use = tool_use(tools, choice, parallel)
    assert use is not None
    return use


def matcher(grammars: Grammars, form: ToolFormat, use: ToolUse, *, special: bool) -> LLMatcher:
    """With the mark as text, or as the special token IM_START."""

    def spell(piece: str) -> str:
        return f"<[{IM_START}]>" if special and piece == form.mark else json.dumps(piece)

    lark = form.grammar(use, spell)
    return matcher_of(compiled(grammars, Kind.GRAMMAR, lark, "tools"))


def written(form: ToolFormat, matcher: LLMatcher, rng: random.Random) -> str:
    """A random answer, likelier to end where it may."""
    ids: list[int] = []
    while not matcher.is_stopped():
        may_follow = next_ids(matcher)
        ends = IM_END in may_follow and rng.random() < 0.5
        ids.append(IM_END if ends else rng.choice(may_follow))
        assert matcher.consume_token(ids[-1])
    parts = bytes(0 if i == IM_START else i for i in ids if i != IM_END)
    return parts.decode().replace("\0", form.mark)


def read(form: ToolFormat, text: str) -> tuple[str, list[tuple[str, str]]]:
    reader = ToolReader(form, set(PARAMETERS))
    pieces = [*reader.feed(text), *reader.finish()]
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    calls = [
        (
            call.name,
            "".join(
                one.text for one in pieces if isinstance(one, Arguments) and one.index == call.index
            ),
        )
        for call in pieces
        if isinstance(call, Call)
    ]
    return content, calls


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_required_calls_are_read_and_fit_their_schemas(
    grammars: Grammars, form: ToolFormat, special: bool, parallel: bool
) -> None:
    start = matcher(grammars, form, use_of("required", parallel), special=special)
    rng = random.Random(1)
    counts = set()
    for _ in range(40):
        content, calls = read(form, written(form, start.deep_copy(), rng))
        assert content == "" and calls
        counts.add(len(calls))
        for name, arguments in calls:
            validate(json.loads(arguments), PARAMETERS[name])
    assert counts == {1} if form.is_single or not parallel else len(counts) > 1


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_named_function_is_called_once(grammars: Grammars, form: ToolFormat) -> None:
    choice = {"type": "function", "function": {"name": "get.time-2"}}
    use = use_of(NamedTool.model_validate(choice))
    text = written(form, matcher(grammars, form, use, special=False), random.Random(2))
    ((name, arguments),) = read(form, text)[1]

    assert name == "get.time-2" and json.loads(arguments) == {}


@pytest.mark.parametrize("form", [HERMES, MISTRAL, MISTRAL_ARGS], ids=lambda form: form.name)
def test_strict_functions_leave_text_free_and_calls_bound(
    grammars: Grammars, form: ToolFormat
) -> None:
    start = matcher(grammars, form, use_of("auto", strict=True), special=False)
    good = form.spelled("get_weather", '{"city":"Paris"}')
    bad = form.spelled("get_weather", '{"town":"Paris"}')
    cases = {"Just text.": True, f"Well: {good}": True, good: True, f"Well: {bad}": False}
    for text, allowed in cases.items():
        walker = start.deep_copy()
        count = walker.try_consume_tokens(list(text.encode()))
        assert (count == len(text.encode()) and walker.is_accepting()) is allowed
