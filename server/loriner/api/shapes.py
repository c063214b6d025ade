"""The bodies we answer with, as OpenAI's document draws them.

Plain structs, encoded by msgspec on the hot path. Invariant: a key that OpenAI requires is always
there, null when empty; a key that a caller must ask for is UNSET until asked for.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType


class Origin(Struct):
    """Our own top-level field `loriner`: which weights answered."""

    adapter: str | None  # full name, null for the base
    generation: str | None
    base_digest: str
    cold_start: bool


class PromptTokens(Struct):
    cached_tokens: int = 0


class CompletionTokens(Struct):
    reasoning_tokens: int = 0


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(Struct):
    arguments: str
    name: str | UnsetType = UNSET  # with the first piece of a streamed call


class ToolCall(Struct):
    function: FunctionCall
    index: int | UnsetType = UNSET  # of a streamed call
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class Message(Struct):
    content: str | None
    role: str = "assistant"
    refusal: str | None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET  # vLLM's newer name of the same
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class Delta(Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatDeltaChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class PromptLogprob(Struct):
    """Of a prompt's token or of what might have stood there; vLLM's."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token id, the prompt's own first


class TextLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float | None]  # null: of the first token of an echoed prompt
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Struct):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Answer(Struct):
    """A whole body or one chunk of it, for chat and completions alike."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Any]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET  # of a chat
    loriner: Origin | UnsetType = UNSET


class Embedding(Struct):
    index: int
    embedding: list[float] | str  # [H] of length 1; a string is base64 of f32, little-endian
    object: str = "embedding"


class PromptUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct):
    id: str
    data: list[Embedding]
    model: str
    usage: PromptUsage
    loriner: Origin
    object: str = "list"


class Model(Struct):
    id: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    object: str = "model"


class ModelList(Struct):
    data: list[Model]
    object: str = "list"


class Error(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class Refusal(Struct):
    """The body of every error, as `status.error_body` makes it."""

    error: Error
