"""Items of /v1/responses' `input` -> the messages of a chat.

Types and the order of turns; checks nothing that the chat's own validation checks. Invariant: each
part of an item is in a message, or the item is refused by its place, and `places` leads from every
message back to its item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from loriner.adapters.names import show
from loriner.api.schema_base import Body
from loriner.errors import InvalidRequestError

MAX_ITEMS = 4096
MAX_PARTS = 1024
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


class Part(Body):
    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str | None = None
    refusal: str | None = None


Parts = Annotated[list[Part], Field(max_length=MAX_PARTS)]


class MessageItem(Body):
    type: Literal["message"] = "message"
    role: Literal["developer", "system", "user", "assistant"]
    content: str | Parts


class ThoughtText(Body):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Body):
    type: Literal["reasoning"]
    content: Annotated[list[ThoughtText], Field(max_length=MAX_PARTS)] | None = None
    summary: Annotated[list[Any], Field(max_length=0)] = []
    encrypted_content: None = None


class CallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class OutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Parts


def _kind(item: Any) -> str:
    return str(item.get("type", "message") if isinstance(item, dict) else item.type)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")],
    Discriminator(_kind),
]
AnyItem = MessageItem | ReasoningItem | CallItem | OutputItem
_KINDS = ("message", "reasoning", "function_call", "function_call_output")


def check_kinds(items: Any) -> None:
    """Raises InvalidRequestError for the first item or part of a type that is not served."""
    for i, item in enumerate(items if isinstance(items, list) else ()):
        if not isinstance(item, dict):
            continue
        kind = item.get("type", "message")
        if kind not in _KINDS:
            raise InvalidRequestError(
                f"Items of type '{show(str(kind))}' are not served; {', '.join(_KINDS)} are.",
                f"input[{i}].type",
            )
        if kind == "reasoning":
            continue
        name = "output" if kind == "function_call_output" else "content"
        parts = item.get(name)
        for j, part in enumerate(parts if isinstance(parts, list) else ()):
            _check_part(part, f"input[{i}].{name}[{j}]")


def _check_part(part: Any, param: str) -> None:
    if not isinstance(part, dict) or "type" not in part:
        return
    kind = _TEXTS.get(str(part["type"]))
    if kind is None:
        raise InvalidRequestError(
            f"Content of type '{show(str(part['type']))}' is not served: this is a text model.",
            f"{param}.type",
        )
    if part.get(kind) is None:
        raise InvalidRequestError(
            f"Missing required parameter: '{param}.{kind}'.", f"{param}.{kind}"
        )


@dataclass(slots=True)
class Conversation:
    """Messages as JSON has them."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)  # path in the chat -> path in the request
    _thoughts: list[str] = field(default_factory=list)  # of the assistant's turn to come
    _thought_at: str = ""

    def say(self, role: str, content: Any, place: str) -> None:
        if role != "assistant":
            self.settle()
        self.places[f"messages[{len(self.messages)}]"] = place
        self.messages.append({"role": role, "content": content})
        if self._thoughts:
            self.messages[-1]["reasoning_content"] = "\n".join(self._thoughts)
            self._thoughts = []

    def settle(self) -> None:
        """Reasoning that nothing followed is a turn of its own."""
        if self._thoughts:
            self.say("assistant", "", self._thought_at)

    def add(self, item: AnyItem, place: str) -> None:
        if isinstance(item, ReasoningItem):
            self._thoughts += [part.text for part in item.content or ()]
            self._thought_at = place
        elif isinstance(item, MessageItem):
            self.say(item.role, _content(item.content), place)
        elif isinstance(item, OutputItem):
            self.say("tool", _content(item.output), place)
            self.messages[-1]["tool_call_id"] = item.call_id
        else:
            self._call(item, place)

    def _call(self, item: CallItem, place: str) -> None:
        """Calls that follow each other, or an answer's text, are one turn."""
        if self._thoughts or not self.messages or self.messages[-1]["role"] != "assistant":
            self.say("assistant", None, place)
        calls = self.messages[-1].setdefault("tool_calls", [])
        self.places[f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}].function"] = place
        calls.append(
            {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
        )


def conversation(asked: str | Sequence[AnyItem], instructions: str | None) -> Conversation:
    """`instructions` come first, as the system's."""
    made = Conversation()
    if instructions is not None:
        made.say("system", instructions, "instructions")
    if isinstance(asked, str):
        made.say("user", asked, "input")
        return made
    for i, item in enumerate(asked):
        made.add(item, f"input[{i}]")
    made.settle()
    return made


def _content(given: str | Sequence[Part]) -> Any:
    if isinstance(given, str):
        return given
    return [
        {
            "type": (kind := _TEXTS[part.type]),
            kind: part.refusal if kind == "refusal" else part.text,
        }
        for part in given
    ]
