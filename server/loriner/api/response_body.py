"""What POST /v1/responses accepts, as a chat: the part of OpenAI's API that keeps nothing.

Types live here; the chat that is made of them is validated as every chat is. Invariant: a field of
the class is honoured, a field that is chat's under another name or that asks for a memory is
refused by name, and errors name fields as this body has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from loriner.api.response_items import MAX_ITEMS, Item, check_kinds, conversation
from loriner.api.schema import ChatBody, Effort
from loriner.api.schema_base import MAX_NAME_CHARS, Body
from loriner.api.schema_sampling import (
    AdapterName,
    SamplingBody,
    ScaledAdapter,
    ScaledAdapters,
)
from loriner.api.structured import JsonObjectAnswer, Schema, TextAnswer
from loriner.api.tool_schema import MAX_TOOLS, Function
from loriner.api.unserved import RESPONSES, refuse_unserved
from loriner.api.validation import validate

MAX_METADATA = 16
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]

_SAME = ("model", "adapter", "temperature", "top_p", "stream")
_PASSED_ON = frozenset(SamplingBody.model_fields) | {"chat_template_kwargs", "include_reasoning"}
_RENAMED = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    name: str
    schema_: Schema = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextSettings(Body):
    model_config = ConfigDict(extra="forbid")

    format: (
        Annotated[TextAnswer | JsonObjectAnswer | JsonSchemaFormat, Field(discriminator="type")]
        | None
    ) = None
    verbosity: Literal["medium"] | None = None


class ReasoningSettings(Body):
    model_config = ConfigDict(extra="forbid")

    effort: Effort | None = None
    summary: None = None
    generate_summary: None = None


class FunctionTool(Function):
    type: Literal["function"]


class NamedFunction(Body):
    type: Literal["function"]
    name: str


class ResponseBody(Body):
    """POST /v1/responses. Sampling fields of chat that are not here go on to it unchanged."""

    model: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    adapter: AdapterName | ScaledAdapter | ScaledAdapters | None = None
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stream: bool = False
    text: TextSettings = TextSettings()
    reasoning: ReasoningSettings = ReasoningSettings()
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedFunction = "auto"
    parallel_tool_calls: bool = True
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA)] = {}
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unserved(cls, data: Any) -> Any:
        refuse_unserved(data, RESPONSES)
        check_kinds(data.get("input"))
        return data

    def chat(self, places: dict[str, str]) -> ChatBody:
        """The same request as chat has it; `places` gets what `path_of` needs. Raises
        InvalidRequestError, in chat's names."""
        made = conversation(self.input, self.instructions)
        places |= made.places
        extras = self.model_extra or {}
        data = {name: value for name, value in extras.items() if name in _PASSED_ON}
        data |= {name: getattr(self, name) for name in _SAME}
        data |= {"messages": made.messages, "max_completion_tokens": self.max_output_tokens}
        data["response_format"] = self._response_format()
        data["reasoning_effort"] = self.reasoning.effort
        if self.tools:
            data["tools"] = [_nested(tool) for tool in self.tools]
            data["parallel_tool_calls"] = self.parallel_tool_calls
        if self.tools or self.tool_choice != "auto":
            data["tool_choice"] = _choice(self.tool_choice)
        return validate(ChatBody, data)

    def _response_format(self) -> dict[str, Any] | None:
        asked = self.text.format
        if asked is None:
            return None
        if isinstance(asked, JsonSchemaFormat):
            schema = {"name": asked.name, "schema": asked.schema_, "strict": asked.strict}
            return {"type": "json_schema", "json_schema": schema}
        return {"type": asked.type}


def path_of(param: str, places: Mapping[str, str]) -> str:
    """A field of the chat -> the field of this body that it was made of."""
    for chat in sorted(places, key=len, reverse=True):
        if param == chat or param.startswith((f"{chat}.", f"{chat}[")):
            inner = param.removeprefix(chat)
            place = places[chat]
            return place if place in ("input", "instructions") else place + inner
    param = param.replace(".json_schema", "", 1)
    head, dot, rest = param.partition(".")
    if head.startswith("tool"):
        return param.replace(".function", "", 1)
    return _RENAMED.get(head, head) + dot + rest


def _nested(tool: FunctionTool) -> dict[str, Any]:
    function = tool.model_dump(exclude_none=True, include=set(Function.model_fields))
    return {"type": "function", "function": function}


def _choice(choice: str | NamedFunction) -> Any:
    if isinstance(choice, str):
        return choice
    return {"type": "function", "function": {"name": choice.name}}
