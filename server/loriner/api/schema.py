"""What the OpenAI endpoints accept. Types live here; ranges live in `core.SamplingParams`.

Unknown fields are allowed, as OpenAI-compatible servers do, but a known field that would change the
answer and is not served is refused by name (`unserved.py`). Invariant: a field in these classes is
honoured.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from loriner.api.schema_base import Body
from loriner.api.schema_sampling import AdaptedBody, NamingBody, NumTop, SamplingBody
from loriner.api.tool_schema import ToolChoice, Tools, ToolUse, tool_use
from loriner.api.unserved import CHAT, COMPLETION, EMBEDDING, NAMING, TOKENIZE
from loriner.core import MAX_CHOICES
from loriner.errors import InvalidRequestError

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TOKENS = 1 << 20
MAX_TEMPLATE_KWARGS = 16
MAX_TEMPLATE_KWARG_CHARS = 256

TemplateValue = bool | int | float | Annotated[str, Field(max_length=MAX_TEMPLATE_KWARG_CHARS)]

TemplateKwargs = Annotated[dict[str, TemplateValue | None], Field(max_length=MAX_TEMPLATE_KWARGS)]


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


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
    echo: bool = False  # vLLM
    add_special_tokens: bool = False  # to what the template writes
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

    def prompt_top(self) -> int | None:
        asked = self.num_logprobs() if self.echo else None
        return asked if self.prompt_logprobs is None else self.prompt_logprobs

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

    def prompt_tops(self) -> dict[int, str]:
        """An echo alone is read, too: the engine has nothing else to do for it."""
        alone = {0: "echo"} if self.echo and self.max_tokens == 0 else {}
        return alone | super().prompt_tops()


class EmbeddingBody(AdaptedBody):
    """POST /v1/embeddings. `input` is split up by `prompts.py`."""

    UNSERVED = EMBEDDING
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    add_special_tokens: bool = True


class TokenizeBody(NamingBody):
    """POST /tokenize, in vLLM's shape: `prompt` or `messages`."""

    UNSERVED = TOKENIZE
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None  # to `prompt`: true; a template writes its own
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: TemplateKwargs = {}
    tools: Tools = []
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    return_token_strs: bool = False

    def chat(self) -> ChatBody | None:
        """The conversation, when it is one. Raises InvalidRequestError unless it is one of two."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("Give either `prompt` or `messages`.", "prompt")
        if self.messages is None:
            if self.tools:
                raise InvalidRequestError("tools need `messages`.", "tools")
            return None
        given = self.model_fields_set & ChatBody.model_fields.keys()
        return ChatBody(**{name: getattr(self, name) for name in given})


class DetokenizeBody(NamingBody):
    """POST /detokenize."""

    UNSERVED = NAMING
    tokens: Annotated[list[int], Field(max_length=MAX_TOKENS)]
