"""Tools and calls <-> protos."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from loriner_client import _answers as a
from loriner_client import _queries as q
from loriner_proto.v1 import inference_pb2 as inf

_MODES = {
    "auto": inf.TOOL_CHOICE_MODE_AUTO,
    "none": inf.TOOL_CHOICE_MODE_NONE,
    "required": inf.TOOL_CHOICE_MODE_REQUIRED,
}


def options(asked: q.ChatOptions) -> dict[str, Any]:
    """The fields of a ChatRequest."""
    fields: dict[str, Any] = {**asked}
    if "tools" in asked:
        fields["tools"] = [_function(tool) for tool in asked["tools"]]
    if "tool_choice" in asked:
        fields["tool_choice"] = _choice(asked["tool_choice"])
    return fields


def calls(delta: inf.Delta | inf.Choice) -> Iterator[a.ToolCall]:
    found: Any = delta.tool_calls
    for i, call in enumerate(found):
        index = call.index if isinstance(call, inf.ToolCallDelta) else i
        yield a.ToolCall(call.id, call.name, call.arguments, index)


def _function(tool: q.Function) -> inf.Function:
    schema = tool.parameters
    return inf.Function(
        name=tool.name,
        description=tool.description,
        parameters=schema if schema is None or isinstance(schema, str) else json.dumps(schema),
        strict=tool.strict,
    )


def _choice(choice: q.ToolChoice) -> inf.ToolChoice:
    if isinstance(choice, q.Function):
        return inf.ToolChoice(function=choice.name)
    return inf.ToolChoice(mode=_MODES.get(choice, inf.TOOL_CHOICE_MODE_UNSPECIFIED))
