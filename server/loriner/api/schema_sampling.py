"""What all requests that run have in common: the weights, whose turn it is, and sampling.

Types live here; ranges live in `core.SamplingParams`. Invariant: a field in these classes is
honoured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from loriner.adapters.mixture import MAX_MIXED
from loriner.adapters.names import show
from loriner.api.schema_base import MAX_NAME_CHARS, Body
from loriner.api.structured import ResponseFormat, StructuredOutputs, constraint_of
from loriner.api.unserved import refuse_unserved
from loriner.core import MAX_LOGPROBS, SamplingParams, Scaled
from loriner.engine.grammars import Constraint
from loriner.errors import InvalidRequestError

MAX_PRIORITY = 1000
MAX_SCALE = 100.0

NumTop = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
AdapterName = Annotated[str, Field(max_length=MAX_NAME_CHARS)]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM
    include_obfuscation: Literal[False] | None = None


class ScaledAdapter(Body):
    """One of several adapters whose deltas add up."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    scale: Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE, allow_inf_nan=False)] = 1.0


ScaledAdapters = Annotated[list[ScaledAdapter], Field(min_length=1, max_length=MAX_MIXED)]


class NamingBody(Body):
    """Names the weights."""

    UNSERVED: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    model: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    adapter: AdapterName | ScaledAdapter | ScaledAdapters | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unserved(cls, data: Any) -> Any:
        refuse_unserved(data, cls.UNSERVED)
        return data

    def adapters(self) -> str | tuple[Scaled, ...] | None:
        """One by name, or several, or one, with scales."""
        given = self.adapter
        if given is None or isinstance(given, str):
            return given
        parts = [given] if isinstance(given, ScaledAdapter) else given
        return tuple(Scaled(part.name, part.scale) for part in parts)


class AdaptedBody(NamingBody):
    """What all that run have in common: the weights, and whose turn it is."""

    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0  # inside the tenant


class SamplingBody(AdaptedBody):
    """What chat and completions have in common: sampling and streaming."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = {}
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False  # vLLM: names of tokens in the logprobs
    prompt_logprobs: NumTop | None = None  # vLLM

    def sampling(self) -> SamplingParams:
        """Raises InvalidRequestError naming the field as the caller wrote it."""
        self.check()
        try:
            return SamplingParams(
                max_tokens=self.token_limit(),
                min_tokens=self.min_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=0 if self.top_k == -1 else self.top_k,  # vLLM's -1 also means all
                min_p=self.min_p,
                seed=self.seed,
                repetition_penalty=self.repetition_penalty,
                frequency_penalty=self.frequency_penalty,
                presence_penalty=self.presence_penalty,
                logit_bias=_logit_bias(self.logit_bias),
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                stop_token_ids=tuple(self.stop_token_ids),
                include_stop_str_in_output=self.include_stop_str_in_output,
                ignore_eos=self.ignore_eos,
                n=self.n,
                logprobs=self.num_logprobs(),
                prompt_logprobs=max((*self.prompt_tops(),), default=None),
            )
        except InvalidRequestError as error:
            param = self.names().get(error.param or "", error.param)
            message = str(error).replace(error.param or "\0", param or "", 1)
            raise InvalidRequestError(message, param) from None

    def check(self) -> None:
        """Raises InvalidRequestError when two fields contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is only allowed when stream is true.", "stream_options"
            )

    def constraint(self) -> Constraint | None:
        """What the answer must look like. Raises InvalidRequestError."""
        return constraint_of(self.response_format, self.structured_outputs)

    def token_limit(self) -> int | None:
        return self.max_tokens

    def num_logprobs(self) -> int | None:
        """How many alternatives each token's log-probability comes with; None: no logprobs."""
        raise NotImplementedError

    def prompt_top(self) -> int | None:
        """How many alternatives each token of the prompt is told with; None: nothing is told."""
        return self.prompt_logprobs

    def echoed_logprobs(self) -> int | None:
        """How many alternatives each token of an echoed prompt comes with; None: no logprobs."""
        return None

    def prompt_tops(self) -> dict[int, str]:
        """What is asked about the prompt's tokens: how many alternatives, by which field."""
        asked = {"echo": self.echoed_logprobs(), "prompt_logprobs": self.prompt_top()}
        return {count: name for name, count in asked.items() if count is not None}

    def names(self) -> dict[str, str]:
        """Fields of SamplingParams that the caller wrote under another name."""
        return {}


def _logit_bias(bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
    wrong = [key for key in bias if not (key.isascii() and key.isdigit() and len(key) <= 10)]
    if wrong:
        raise InvalidRequestError(
            f"logit_bias keys must be token ids, not {show(', '.join(wrong))}.", "logit_bias"
        )
    return tuple([(int(key), value) for key, value in bias.items()])
