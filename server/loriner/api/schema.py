"""What the OpenAI endpoints accept. Types live here; ranges live in `core.SamplingParams`.

Unknown fields are allowed, as OpenAI-compatible servers do, but a known field that would change the
answer and is not served is refused by name (`unserved.py`). Invariant: a field in these classes is
honoured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from loriner.adapters.mixture import MAX_MIXED
from loriner.api.schema_base import Body
from loriner.api.structured import ResponseFormat, StructuredOutputs, constraint_of
from loriner.api.tool_schema import ToolChoice, Tools, ToolUse, tool_use
from loriner.api.unserved import CHAT, COMPLETION, EMBEDDING, TOKENIZE, refuse_unserved
from loriner.core import MAX_CHOICES, MAX_LOGPROBS, SamplingParams, Scaled
from loriner.engine.grammars import Constraint
from loriner.errors import InvalidRequestError

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TOKENS = 1 << 20
MAX_NAME_CHARS = 256
MAX_TEMPLATE_KWARGS = 16
MAX_PRIORITY = 1000
MAX_SCALE = 100.0
MAX_TEMPLATE_KWARG_CHARS = 256

TemplateValue = bool | int | float | Annotated[str, Field(max_length=MAX_TEMPLATE_KWARG_CHARS)]

TemplateKwargs = Annotated[dict[str, TemplateValue | None], Field(max_length=MAX_TEMPLATE_KWARGS)]


NumTop = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
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


class AdaptedBody(Body):
    """What all that run have in common: the weights, and whose turn it is."""

    UNSERVED: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    model: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    adapter: AdapterName | ScaledAdapter | ScaledAdapters | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0  # inside the tenant

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

    def echoed_logprobs(self) -> int | None:
        """How many alternatives each token of an echoed prompt comes with; None: no logprobs."""
        return None

    def prompt_tops(self) -> dict[int, str]:
        """What is asked about the prompt's tokens: how many alternatives, by which field."""
        asked = {"echo": self.echoed_logprobs(), "prompt_logprobs": self.prompt_logprobs}
        return {count: name for name, count in asked.items() if count is not None}

    def names(self) -> dict[str, str]:
        """Fields of SamplingParams that the caller wrote under another name."""
        return {}


class ToolFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str | None = None
    function: ToolFunction


class ContentPart(Body):
    type: str
    text: str | None = None
    refusal: str | None = None


class Message(Body):
    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_PARTS)] | None = None
    name: str | None = None
    reasoning_content: str | None = None  # of an assistant's earlier turn
    reasoning: str | None = None  # vLLM's newer name of the same
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_PARTS)] | None = None
    tool_call_id: str | None = None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    UNSERVED = CHAT
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: NumTop | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: TemplateKwargs = {}
    tools: Tools = []
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool = True  # vLLM
    reasoning_effort: Effort | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs to be true.", "top_logprobs")
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other.",
                "continue_final_message",
            )

    def token_limit(self) -> int | None:
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def tool_use(self) -> ToolUse | None:
        """What may be called; None: nothing. Raises InvalidRequestError."""
        use = tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)
        if use is not None and self.constraint() is not None:
            raise InvalidRequestError(
                "tools need free text or calls: response_format and structured_outputs only go "
                "with tool_choice `none`.",
                "tools",
            )
        return use

    def names(self) -> dict[str, str]:
        renamed = self.max_completion_tokens is not None
        return {"max_tokens": "max_completion_tokens"} if renamed else {}


class CompletionBody(SamplingBody):
    """POST /v1/completions. `prompt` is split up by `prompts.py`."""

    UNSERVED = COMPLETION
    prompt: str | list[Any]
    max_tokens: int | None = 16
    logprobs: NumTop | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    add_special_tokens: bool = True

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != self.n:
            raise InvalidRequestError("best_of must equal n; more is not served.", "best_of")

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def echoed_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None


class EmbeddingBody(AdaptedBody):
    """POST /v1/embeddings. `input` is split up by `prompts.py`."""

    UNSERVED = EMBEDDING
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    add_special_tokens: bool = True


class TokenizeBody(Body):
    """POST /tokenize, in vLLM's shape: `prompt` or `messages`."""

    model: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None  # of `prompt`: true; a template writes its own
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: TemplateKwargs = {}
    tools: Tools = []
    return_token_strs: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_unserved(cls, data: Any) -> Any:
        refuse_unserved(data, TOKENIZE)
        return data

    def chat(self) -> ChatBody | None:
        """The conversation, when it is one. Raises InvalidRequestError unless it is one of two."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("Give either `prompt` or `messages`.", "prompt")
        if self.messages is None:
            if self.tools:
                raise InvalidRequestError("tools need `messages`.", "tools")
            return None
        if self.add_special_tokens:
            raise InvalidRequestError(
                "add_special_tokens is of `prompt`; the chat template writes its own.",
                "add_special_tokens",
            )
        chat = ChatBody(
            messages=self.messages,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
            tools=self.tools,
        )
        chat.check()
        return chat


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    tokens: Annotated[list[int], Field(max_length=MAX_TOKENS)]


def _logit_bias(bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequestError("logit_bias keys must be token ids.", "logit_bias")
        pairs.append((int(key), value))
    return tuple(pairs)
