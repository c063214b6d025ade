"""The nouns of serving, without torch: what a door builds, what the engine runs, what it answers.

Knows nothing of HTTP, gRPC, tensors or files. Invariant: values are frozen and already validated;
`Sequence` is the one thing here with a life, and only the engine's loop touches it.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import msgspec

from loriner.errors import InvalidRequestError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_CHOICES = 128
MAX_LOGPROBS = 20

UNKNOWN = -1  # a token that the GPU has and the host has not


class FinishReason(enum.StrEnum):
    """Why a sequence ended; the values are OpenAI's, plus `abort` and `error`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Raises InvalidRequestError naming the field."""

    max_tokens: int | None = None  # None: until the context is full; 0: only the prompt is read
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None  # None: none; k: the chosen token's and the k best
    prompt_logprobs: int | None = None  # None: none; k: of the prompt's tokens, with the k best
    special_text: bool = False  # special tokens show in the text
    grammar: str | None = None  # of the whole output, as `engine/grammars.py` compiles it

    def __post_init__(self) -> None:
        _check_range("max_tokens", self.max_tokens, 0, 2**31)
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise InvalidRequestError(
                "max_tokens must be at least 1: nothing of the prompt is asked for.", "max_tokens"
            )
        _check_range("min_tokens", self.min_tokens, 0, 2**31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError("min_tokens must not exceed max_tokens.", "min_tokens")
        _check_range("temperature", self.temperature, 0.0, 2.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("top_k", self.top_k, 0, 2**31)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("seed", self.seed, -(2**63), 2**63 - 1)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("n", self.n, 1, MAX_CHOICES)
        _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _check_length("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        for _, bias in self.logit_bias:
            _check_range("logit_bias", bias, -100.0, 100.0)
        _check_length("stop", self.stop, MAX_STOP_STRINGS)
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise InvalidRequestError(
                    f"each stop string must have 1 to {MAX_STOP_CHARS} characters.", "stop"
                )
        _check_length("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        if self.grammar is not None and (self.ignore_eos or self.min_tokens):
            raise InvalidRequestError(
                "a structured output ends where its grammar does: ignore_eos and min_tokens cannot "
                "be kept.",
                "ignore_eos" if self.ignore_eos else "min_tokens",
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def looks_back(self) -> bool:
        """Whether the tokens so far weigh in the choice of the next."""
        return bool(
            self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty
        )


class Scaled(NamedTuple):
    """An adapter by name, and what its delta is multiplied with."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Turn:
    """What decides when a request that waits may run."""

    weight: float = 1.0  # of its tenant, against others
    priority: int = 0  # inside its tenant; lower runs earlier


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the engine sees it: tokens in, and the pinned generation to run them on."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    generation: str | None = None  # digest of the adapter generation; None is the base
    salt: str = ""  # tenant; part of every KV block's key
    arrival_s: float = 0.0  # time.monotonic() at the door
    turn: Turn = Turn()
    embeds: bool = False  # it has one sequence, which ends with a vector instead of tokens


class Guide(Protocol):
    """Where a sequence is in its grammar; `engine/guides.py` has the one there is."""

    def allowed(self) -> Any:
        """Ids of the tokens that may come next, ascending, at least one: an array [A] i64."""

    def words(self) -> Any:
        """The same, a bit for each token: an array [ceil(V / 32)] i32. None where nothing was asked
        of the guide for this step: its sequence has ended."""

    def accept(self, token_id: int) -> None:
        """Walk over the chosen token. Raises InvalidRequestError when the way is too hard."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but the end."""


class Sequence:
    """One running generation of tokens: a request has `n` of them. Owned by the engine's loop.

    `token_ids` may end in UNKNOWN: chosen by a step under way, whose result is not here yet.
    """

    __slots__ = (
        "blocks",
        "cold_start",
        "done",
        "generates",
        "generation",
        "guide",
        "hashes",
        "index",
        "limit",
        "looks_back",
        "memo",
        "needs_host",
        "num_cached",
        "num_charged",
        "num_computed",
        "num_keyed",
        "num_known",
        "num_preemptions",
        "num_prompt",
        "num_settled",
        "num_when_preempted",
        "reading",
        "reads_prompt",
        "request",
        "row",
        "seated",
        "seed",
        "source",
        "token_ids",
    )

    def __init__(self, request: Request, index: int, seed: int, max_len: int = 2**31) -> None:
        self.request = request
        self.index = index  # which of the n choices
        self.seed = seed  # of this sequence's own noise
        self.generation = request.generation
        self.num_prompt = len(request.prompt_ids)
        max_tokens = request.sampling.max_tokens
        self.limit = min(max_len, max_len if max_tokens is None else self.num_prompt + max_tokens)
        self.token_ids = list(request.prompt_ids)  # prompt, then output
        self.num_known = self.num_prompt  # of `token_ids`; the others are UNKNOWN
        self.num_computed = 0  # tokens whose keys and values are in the cache once all launched
        # steps have ended; set by the engine
        self.num_settled = 0  # of those, by steps that have ended; set by the block manager
        self.num_cached = 0  # of the prompt, found in the prefix cache; set by the block manager
        self.num_charged = 0  # tokens that its tenant was charged for or got free; set by `Turns`
        self.num_preemptions = 0
        self.num_when_preempted = 0  # tokens it had at the last preemption; set by the scheduler
        self.blocks: list[int] = []  # set by the block manager
        self.row = -1  # of the block table, while there are blocks; set by the block manager
        self.hashes: list[bytes] = []  # keys of the full blocks so far; set by the block manager
        self.num_keyed = 0  # blocks that the prefix cache has seen; set by the block manager
        self.source = -1  # its place among the tokens that the last step chose; set by the engine
        self.needs_host = False  # its next step needs the last one's token; set by the engine
        self.looks_back = request.sampling.looks_back
        self.guide: Guide | None = None  # of a constrained one; set by the engine
        self.generates = not request.embeds and max_tokens != 0  # tokens, not only a reading
        scores = request.sampling.prompt_logprobs is not None and (index == 0 or not self.generates)
        self.reads_prompt = request.embeds or scores  # until all its rows are; ended by the engine
        self.reading: Any = None  # what steps told of those rows so far; set by the engine
        self.memo: dict[str, object] = {}  # what a runner makes of `sampling` and `seed` once
        self.seated = False  # holds a pin on its adapter's seat; set by the scheduler
        self.cold_start = False  # waited for its adapter to be loaded; set by the scheduler
        self.done = False  # has had its last event; set by the engine

    @property
    def num_output(self) -> int:
        """Output tokens that are known."""
        return self.num_known - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def all_known(self) -> bool:
        return self.num_known == len(self.token_ids)

    def learn(self, place: int, token_id: int) -> None:
        """The token at `place`, which was UNKNOWN, is this one."""
        assert self.num_known == place and self.token_ids[place] == UNKNOWN
        self.token_ids[place] = token_id
        self.num_known = place + 1

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.num_known += 1


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability (natural log) under the model's own distribution; NaN for a
    prompt's first token, which nothing stands before."""

    token_id: int
    logprob: float
    token: str = ""  # the token's text alone
    top: tuple[TokenLogprob, ...] = ()
    rank: int = 0  # 1 is the likeliest; 0: not told


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step added to one sequence. The last event of a sequence has a finish_reason."""

    request_id: str
    index: int  # which of the n choices
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token that ended it
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, served from the prefix cache
    num_output_tokens: int = 0  # so far
    cold_start: bool = False  # the adapter had to be loaded for this request
    # Of every token of the prompt: with choice 0's first token, or its end where none is wanted.
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    embedding: bytes = b""  # [H] f32, little-endian, of length 1: with the last event
    error: str | None = None  # set when finish_reason is ERROR: a message safe to show
    error_kind: str | None = None  # class name in errors.py


def _check_range(
    name: str,
    value: float | int | None,
    low: float,
    high: float,
    *,
    open_low: bool = False,
) -> None:
    if value is None:
        return
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside or (isinstance(value, float) and not math.isfinite(value)):
        bracket = "(" if open_low else "["
        raise InvalidRequestError(
            f"{name} must be in {bracket}{_plain(low)}, {_plain(high)}], got {value}.", name
        )


def _plain(bound: float | int) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _check_length(name: str, values: tuple[object, ...], limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequestError(f"{name} has {len(values)} entries, at most {limit}.", name)
