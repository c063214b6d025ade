"""Tools and calls <-> the JSON of the HTTP door."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from loriner_client import _answers as a
from loriner_client import _queries as q
from loriner_client._errors import InvalidRequestError

Json = dict[str, Any]


def options(asked: q.ChatOptions) -> Json:
    """The fields of a chat's body. Raises InvalidRequestError for a schema that is no JSON."""
    fields: Json = {**asked}
    if "tools" in asked:
        fields["tools"] = [
            {"type": "function", "function": _function(tool)} for tool in asked["tools"]
        ]
    choice = asked.get("tool_choice")
    if isinstance(choice, q.Function):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    return fields


def calls(adds: Json) -> Iterator[a.ToolCall]:
    """Those of a message, or the pieces of a delta."""
    for i, call in enumerate(adds.get("tool_calls") or ()):
        function = call["function"]
        call_id, name = call.get("id", ""), function.get("name", "")
        yield a.ToolCall(call_id, name, function["arguments"], call.get("index", i))


def _function(tool: q.Function) -> Json:
    fields = {
        "name": tool.name,
        "description": tool.description,
        "parameters": _schema(tool.parameters),
        "strict": tool.strict,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _schema(given: str | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if not isinstance(given, str):
        return given
    try:
        found: Mapping[str, Any] = json.loads(given)
    except ValueError as error:
        raise InvalidRequestError(f"parameters of a tool must be a JSON object: {error}.") from None
    return found
