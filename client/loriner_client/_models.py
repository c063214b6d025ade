"""What is asked and what is answered, as plain values. Knows no transport.

A `Query[A]` is one question whose answer is an `A`. Invariant: a field that is None was not given,
and the server's default holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar

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
class ToolCall:
    """A call. In a stream its first piece has its id and name, the others more of its
    arguments."""

    id: str
    name: str
    arguments: str  # a JSON object
    index: int = 0  # which of the answer's calls


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # system, developer, user, assistant, tool
    content: str | None
    name: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None  # of an assistant's earlier turn


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of a token's probability."""

    token: str
    logprob: float
    token_id: int | None = None  # of an answer's token, not told over HTTP
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Opening:
    """Which weights answer."""

    answer_id: str
    model: str
    adapter: str | None  # tenant/name; None is the base
    generation: str | None  # digest
    base_digest: str
    cold_start: bool  # the adapter had to be loaded for this request
    # Of the prompt's tokens but the first, when they were asked for; `top` are likely others.
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What was added to one choice; its last delta has a finish_reason."""

    text: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None  # stop, length, tool_calls
    stop_reason: str | int | None = None  # the stop string or token that ended it
    reasoning: str = ""  # apart from the text, where the base's template has marks for it
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, found in the server's cache
    reasoning_tokens: int = 0  # of the completion


Part = Opening | Delta | Usage


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer; `choices` are whole deltas, by index."""

    opening: Opening
    choices: tuple[Delta, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Of the first choice."""
        return self.choices[0].tool_calls


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A vector of length 1 for each input, in their order."""

    opening: Opening
    vectors: tuple[tuple[float, ...], ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class Adapter:
    """A name and the generation that it stands for."""

    name: str  # tenant/name
    generation: str
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    num_bytes: int
    pinned: bool
    created_at: int  # unix seconds
    alias_of: str | None
    base_digest: str | None
    source: str
    state: str  # ready, quarantined, other base
    tier: str | None  # disk, host, gpu; None where it was not asked
    has_template: bool = False  # it brought a chat template of its own


@dataclass(frozen=True, slots=True)
class AdapterDetail:
    """An adapter, and the generations that its name stood for, newest (the present one) first."""

    adapter: Adapter
    history: tuple[Adapter, ...]


@dataclass(frozen=True, slots=True)
class AdapterPage:
    adapters: tuple[Adapter, ...]
    next_page: str = ""  # "": this was the last one


@dataclass(frozen=True, slots=True)
class UploadReport:
    """What a publish did."""

    name: str
    generation: str
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    num_bytes: int
    modules_matched: int
    modules_total: int
    existed: bool  # the same weights were there already
    ignored: tuple[str, ...]  # files that are no part of an adapter


@dataclass(frozen=True, slots=True)
class Status:
    """The server itself."""

    state: str
    num_restarts: int
    model: str
    base_digest: str
    version: str
    max_model_len: int
    num_running: int
    num_waiting: int


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
