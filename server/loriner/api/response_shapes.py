"""The bodies that /v1/responses answers with, as OpenAI's document draws them.

Plain structs. Invariant: a key that OpenAI requires is always there, null when empty; an event's
`type` is its first key.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from loriner.api.shapes import Origin


class OutputText(Struct):
    text: str
    type: str = "output_text"
    annotations: tuple[()] = ()
    logprobs: tuple[()] = ()


class MessageItem(Struct):
    id: str
    content: list[OutputText]
    status: str = "in_progress"
    type: str = "message"
    role: str = "assistant"


class ReasoningText(Struct):
    text: str
    type: str = "reasoning_text"


class ReasoningItem(Struct):
    id: str
    content: list[ReasoningText]
    status: str = "in_progress"
    type: str = "reasoning"
    summary: tuple[()] = ()


class CallItem(Struct):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: str = "in_progress"
    type: str = "function_call"


class InputTokens(Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokens(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputTokens
    output_tokens_details: OutputTokens


class Cut(Struct):
    reason: str = "max_output_tokens"


class Failure(Struct):
    code: str
    message: str


class Effort(Struct, frozen=True):
    effort: str | None = None
    summary: None = None


class Response(Struct, kw_only=True):
    """What was asked is said again, with its defaults."""

    id: str
    created_at: int
    model: str
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    prompt_cache_key: str | None
    safety_identifier: str | None
    presence_penalty: float
    reasoning: Effort
    frequency_penalty: float
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    user: str | None
    loriner: Origin
    object: str = "response"
    status: str = "in_progress"
    completed_at: int | None = None
    error: Failure | None = None
    incomplete_details: Cut | None = None
    output: list[Any] = []
    usage: ResponseUsage | None = None
    background: bool = False
    max_tool_calls: None = None
    previous_response_id: None = None
    service_tier: str = "default"
    store: bool = False
    top_logprobs: int = 0
    truncation: str = "disabled"


Item = MessageItem | ReasoningItem | CallItem


class ResponseEvent(Struct):
    """`response.created`, `.in_progress`, `.completed`, `.incomplete`, `.failed`."""

    type: str
    sequence_number: int
    response: Response


class ItemEvent(Struct):
    """`response.output_item.added`, `.done`."""

    type: str
    sequence_number: int
    output_index: int
    item: Item


class PartEvent(Struct):
    """`response.content_part.added`, `.done`."""

    type: str
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    part: OutputText | ReasoningText


class TextDelta(Struct):
    """`response.output_text.delta`, `response.reasoning_text.delta`."""

    type: str
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: tuple[()] = ()


class TextDone(Struct):
    """`response.output_text.done`, `response.reasoning_text.done`."""

    type: str
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: tuple[()] = ()


class ArgumentsDelta(Struct):
    sequence_number: int
    item_id: str
    output_index: int
    delta: str
    type: str = "response.function_call_arguments.delta"


class ArgumentsDone(Struct):
    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str
    type: str = "response.function_call_arguments.done"


Event = (
    ResponseEvent | ItemEvent | PartEvent | TextDelta | TextDone | ArgumentsDelta | ArgumentsDone
)
