"""What is asked, as plain values. Knows no transport.

A `Query[A]` is one question whose answer is an `A`. Invariant: a field that is None was not given,
and the server's default holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar

from loriner_client._answers import (
    Adapter,
    AdapterDetail,
    AdapterPage,
    Completion,
    Embeddings,
    Status,
    ToolCall,
)

A = TypeVar("A")
TemplateValue = bool | int | float | str
Which = str | Mapping[str, float]  # an adapter, or several with the scales of their deltas


class Sampling(TypedDict, total=False):
    """How tokens are chosen and when to stop; what is left out has the server's default."""

    max_tokens: int
    min_tokens: int
    temperature: float  # 0 is greedy
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]  # by token id
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    ignore_eos: bool
    n: int
    logprobs: int  # that many alternatives with each token
    prompt_logprobs: int  # the same of the prompt's tokens, in the opening


class StructuredOutputs(TypedDict, total=False):
    """What the whole answer must match: one of these."""

    json: str | Mapping[str, Any]  # a JSON schema
    regex: str
    choice: Sequence[str]  # one of these texts
    grammar: str  # Lark, or GBNF
    json_object: bool  # True: any JSON object


@dataclass(frozen=True, slots=True)
class Function:
    """A tool: what an answer may call."""

    name: str
    description: str | None = None
    parameters: str | Mapping[str, Any] | None = None  # a JSON schema of its arguments
    strict: bool | None = None  # arguments fit the schema even where no call has to be made


ToolChoice = Literal["auto", "none", "required"] | Function  # one call of this one


class ChatOptions(TypedDict, total=False):
    """What a conversation may ask for beside sampling."""

    tools: Sequence[Function]
    tool_choice: ToolChoice
    parallel_tool_calls: bool
    include_reasoning: bool
    reasoning_effort: str


class Asked(Sampling, ChatOptions, total=False):
    """All of both."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # system, developer, user, assistant, tool
    content: str | None
    name: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None  # of an assistant's earlier turn


class Query(Generic[A]):
    """A question; `A` is its answer's type."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Chat(Query[Completion]):
    messages: Sequence[Message]
    adapter: Which | None = None
    model: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    priority: int | None = None
    template: Mapping[str, TemplateValue] = field(default_factory=dict)
    structured_outputs: StructuredOutputs | None = None
    options: ChatOptions = field(default_factory=ChatOptions)


@dataclass(frozen=True, slots=True)
class Generate(Query[Completion]):
    prompt: str | Sequence[int]  # a text, or token ids
    adapter: Which | None = None
    model: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    priority: int | None = None
    structured_outputs: StructuredOutputs | None = None


@dataclass(frozen=True, slots=True)
class Tokenize(Query[tuple[int, ...]]):
    input: str | Sequence[Message]
    add_special_tokens: bool | None = None
    adapter: Which | None = None  # whose chat template; of a conversation alone
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Embed(Query[Embeddings]):
    inputs: Sequence[str | Sequence[int]]  # texts, or lists of token ids
    adapter: Which | None = None
    model: str | None = None
    priority: int | None = None
    add_special_tokens: bool | None = None


@dataclass(frozen=True, slots=True)
class GetAdapter(Query[AdapterDetail]):
    name: str


@dataclass(frozen=True, slots=True)
class ListAdapters(Query[AdapterPage]):
    page: str = ""


@dataclass(frozen=True, slots=True)
class SetAlias(Query[Adapter]):
    name: str
    target: str
    expected_generation: str | None = None


@dataclass(frozen=True, slots=True)
class PinAdapter(Query[Adapter]):
    name: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class DeleteAdapter(Query[Adapter]):
    name: str
    expected_generation: str | None = None


@dataclass(frozen=True, slots=True)
class EvictAdapter(Query[Adapter]):
    name: str


@dataclass(frozen=True, slots=True)
class GetStatus(Query[Status]):
    pass


@dataclass(frozen=True, slots=True)
class Drain(Query[int]):
    """Answered with the number of requests under way."""


StreamQuery = Chat | Generate
