"""What is answered, as plain values. Knows no transport."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call. In a stream its first piece has its id and name, the others more of its
    arguments."""

    id: str
    name: str
    arguments: str  # a JSON object
    index: int = 0  # which of the answer's calls


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
