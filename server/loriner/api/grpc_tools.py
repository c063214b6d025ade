"""Tools and calls, between protos and what chat is validated as and answers with. Pure."""

from __future__ import annotations

import json
from typing import Any

from msgspec import UNSET

from loriner.api import shapes
from loriner.errors import InvalidRequestError
from loriner_proto.v1 import inference_pb2 as pb

_MODES = {
    pb.TOOL_CHOICE_MODE_AUTO: "auto",
    pb.TOOL_CHOICE_MODE_NONE: "none",
    pb.TOOL_CHOICE_MODE_REQUIRED: "required",
}


def asked(request: pb.ChatRequest) -> dict[str, Any]:
    """`tools` and `tool_choice` as JSON has them. Raises InvalidRequestError, in JSON's names."""
    data: dict[str, Any] = {}
    if request.tools:
        data["tools"] = [
            {"type": "function", "function": _function(tool, f"tools[{i}]")}
            for i, tool in enumerate(request.tools)
        ]
    if request.HasField("tool_choice"):
        choice = request.tool_choice
        if choice.WhichOneof("choice") == "function":
            data["tool_choice"] = {"type": "function", "function": {"name": choice.function}}
        else:
            data["tool_choice"] = _MODES.get(choice.mode, "")
    return data


def call(made: shapes.ToolCall) -> pb.ToolCall:
    """A whole call."""
    return pb.ToolCall(
        id=_given(made.id), name=_given(made.function.name), arguments=made.function.arguments
    )


def call_delta(made: shapes.ToolCall) -> pb.ToolCallDelta:
    """A piece of a streamed one."""
    return pb.ToolCallDelta(
        index=0 if made.index is UNSET else made.index,
        id=_given(made.id),
        name=_given(made.function.name),
        arguments=made.function.arguments,
    )


def _function(tool: pb.Function, param: str) -> dict[str, Any]:
    data: dict[str, Any] = {"name": tool.name}
    data |= {name: getattr(tool, name) for name in ("description", "strict") if tool.HasField(name)}
    if tool.HasField("parameters"):
        field = f"{param}.function.parameters"
        try:
            data["parameters"] = json.loads(tool.parameters)
        except (ValueError, RecursionError):
            raise InvalidRequestError(f"{field} must be a JSON object.", field) from None
    return data


def _given(text: Any) -> str | None:
    return None if text is UNSET else text
