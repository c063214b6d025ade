"""Tools as callers describe them, and which of them an answer may, must or may not call.

Types and rules of OpenAI's `tools` and `tool_choice`; knows no template. Invariant: a `ToolUse`
names functions that exist, once each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from loriner.api.schema_base import Body
from loriner.errors import InvalidRequestError

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What one answer does with its tools."""

    functions: Sequence[Function]  # those that it may call
    all_functions: Sequence[Function]  # those that the prompt tells of
    must_call: bool
    is_named: bool  # one call of the one function
    is_parallel: bool  # several calls in one answer

    @property
    def is_strict(self) -> bool:
        """Whether arguments must fit their schemas even where no call has to be made."""
        return any(function.strict for function in self.functions)

    def described(self) -> list[dict[str, Any]]:
        """As chat templates expect tools."""
        return [
            {
                "type": "function",
                "function": {
                    "name": function.name,
                    "description": function.description or "",
                    "parameters": function.parameters or NOTHING,
                },
            }
            for function in self.all_functions
        ]


def tool_use(
    tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool | None
) -> ToolUse | None:
    """None when nothing may be called. Raises InvalidRequestError."""
    functions = [tool.function for tool in tools]
    _check_names(functions)
    if not functions and choice not in (None, "none", "auto"):
        raise InvalidRequestError("tool_choice needs tools.", "tool_choice")
    if not functions or choice == "none":
        return None
    if isinstance(choice, NamedTool):
        named = [one for one in functions if one.name == choice.function.name]
        if not named:
            raise InvalidRequestError(
                "tool_choice names a function that is not among tools.",
                "tool_choice.function.name",
            )
        return ToolUse(named, functions, True, True, False)
    return ToolUse(functions, functions, choice == "required", False, parallel is not False)


def _check_names(functions: Sequence[Function]) -> None:
    seen: set[str] = set()
    for i, function in enumerate(functions):
        param = f"tools[{i}].function.name"
        if not _NAME.fullmatch(function.name):
            raise InvalidRequestError(
                f"{param} must have 1 to 64 letters, digits, '_', '-' and '.'.", param
            )
        if function.name in seen:
            raise InvalidRequestError(f"{param} is there twice.", param)
        seen.add(function.name)
