"""What both doors ask for: a validated body -> a `Job` that `running` can run.

Knows the schema and the Service's tokenizer; no door and no wire format. Invariant: every field of
a body has been checked before anything is tokenised.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loriner.api import prompts
from loriner.api.access import Caller
from loriner.api.prompts import Prompt
from loriner.api.reasoning import MAX_TAIL, Thinking, thinking_of
from loriner.api.schema import ChatBody, CompletionBody, EmbeddingBody
from loriner.api.schema_sampling import NamingBody, SamplingBody
from loriner.api.selection import Choice, choose
from loriner.api.tool_calling import ToolCalling, spelled
from loriner.api.tool_formats import format_of
from loriner.core import SamplingParams, Scaled
from loriner.engine.admission import MAX_LOGPROBS_PER_REQUEST
from loriner.engine.grammars import Constraint
from loriner.errors import AdapterNotFoundError, InvalidRequestError

if TYPE_CHECKING:
    from loriner.engine.service import Service


@dataclass(frozen=True, slots=True)
class Job:
    """One validated request."""

    kind: str  # "chatcmpl", "cmpl", "resp" or "embd", the prefix of its id
    prompts: Sequence[Prompt]
    prompt_param: str
    sampling: SamplingParams
    choice: Choice
    caller: Caller
    request_id: str
    priority: int
    calling: ToolCalling | None = None  # None: no tool may be called
    embeds: bool = False  # each prompt becomes a vector; `sampling` says nothing then
    thinking: Thinking | None = None  # None: all text is the answer
    templated: str | None = None  # `name@digest` of the adapter whose own template made the prompt

    @property
    def is_chat(self) -> bool:
        """Whether a chat template made its prompt."""
        return self.kind in ("chatcmpl", "resp")

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.sampling.n


async def chat_job(
    service: Service, body: ChatBody, caller: Caller, request_id: str, kind: str = "chatcmpl"
) -> Job:
    """Raises InvalidRequestError, ModelNotFoundError."""
    sampling, constraint = body.sampling(), body.constraint()
    choice = choose(body.model, body.adapters(), service.model_name)
    rendered = await _rendered(service, body, caller, choice)
    prompt, calling = rendered.prompt, rendered.calling
    _check_prompt_logprobs(body, [prompt])
    thinking = _thinking(service, body, rendered.template, prompt)
    before = ""
    if thinking is not None:
        special = service.chat.special_id(thinking.closing) is not None
        sampling = replace(sampling, special_text=special)
        before = thinking.grammar(lambda mark: spelled(service, mark))
    if constraint is not None:
        sampling = await _keeping(service, sampling, replace(constraint, before=before))
    if calling is not None:
        sampling = await calling.constrain(service, sampling, before)
    return Job(
        kind,
        [prompt],
        "messages",
        sampling,
        choice,
        caller,
        request_id,
        body.priority,
        calling=calling,
        thinking=thinking,
        templated=rendered.templated,
    )


async def chat_tokens(service: Service, body: ChatBody, caller: Caller) -> list[int]:
    """The prompt that `chat_job` would run. Raises what it raises, and what running raises about
    the adapters."""
    body.check()
    choice = choose(body.model, body.adapters(), service.model_name)
    async with _holding(service, choice, caller):
        return (await _rendered(service, body, caller, choice)).prompt.ids


async def check_names(service: Service, body: NamingBody, caller: Caller) -> None:
    """Raises what running raises about the adapters that `body` names."""
    async with _holding(service, choose(body.model, body.adapters(), service.model_name), caller):
        pass


@asynccontextmanager
async def _holding(service: Service, choice: Choice, caller: Caller) -> AsyncIterator[None]:
    try:
        adapters = [Scaled(caller.reach(name), scale) for name, scale in choice.named()]
        async with service.holding(adapters):
            yield
    except AdapterNotFoundError as error:
        raise choice.not_found(error.name) from None


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A chat's prompt, and the template that made it."""

    prompt: Prompt
    template: str
    templated: str | None  # as of a Job
    calling: ToolCalling | None


async def _rendered(service: Service, body: ChatBody, caller: Caller, choice: Choice) -> _Rendered:
    own = await _own_template(service, caller, choice)
    template = await prompts.template_of(service) if own is None else own[0]
    calling = _tool_calling(service, body, template)
    prompt = await prompts.from_chat(service, body, template, calling, is_own=own is not None)
    return _Rendered(prompt, template, None if own is None else own[1], calling)


async def _own_template(service: Service, caller: Caller, choice: Choice) -> tuple[str, str] | None:
    """That of an adapter which is asked for alone. One that is not there is refused when the
    request is admitted, and counted then."""
    named = choice.named()
    if len(named) != 1:
        return None
    try:
        return await service.own_template(caller.reach(named[0].name))
    except AdapterNotFoundError:
        return None


def _tool_calling(service: Service, body: ChatBody, template: str) -> ToolCalling | None:
    """None when nothing may be called. Raises InvalidRequestError."""
    use = body.tool_use()
    return None if use is None else ToolCalling(use, format_of(template, service.tool_format))


def _thinking(service: Service, body: ChatBody, template: str, prompt: Prompt) -> Thinking | None:
    tail = service.decode(prompt.ids[-MAX_TAIL:])
    return thinking_of(template, tail, continued=prompt.continued, shown=body.include_reasoning)


async def text_job(service: Service, body: CompletionBody, caller: Caller, request_id: str) -> Job:
    """Raises InvalidRequestError, ModelNotFoundError."""
    sampling, constraint = body.sampling(), body.constraint()
    if constraint is not None:
        sampling = await _keeping(service, sampling, constraint)
    choice = choose(body.model, body.adapters(), service.model_name)
    entries = await prompts.from_completion(service, body)
    _check_prompt_logprobs(body, entries)
    return Job("cmpl", entries, "prompt", sampling, choice, caller, request_id, body.priority)


async def embedding_job(
    service: Service, body: EmbeddingBody, caller: Caller, request_id: str
) -> Job:
    """Raises InvalidRequestError, ModelNotFoundError."""
    if body.dimensions not in (None, service.hidden_size):
        raise InvalidRequestError(
            f"dimensions must be {service.hidden_size}: this model's vectors cannot be shortened.",
            "dimensions",
        )
    choice = choose(body.model, body.adapters(), service.model_name)
    inputs, sampling = await prompts.from_inputs(service, body), SamplingParams()
    rest = (caller, request_id, body.priority)
    return Job("embd", inputs, "input", sampling, choice, *rest, embeds=True)


def _check_prompt_logprobs(body: SamplingBody, entries: Sequence[Prompt]) -> None:
    """Raises InvalidRequestError when they would fill the memory."""
    num_tokens = sum(len(prompt.ids) for prompt in entries)
    for num_top, param in body.prompt_tops().items():
        count = num_tokens * (1 + num_top)
        if count > MAX_LOGPROBS_PER_REQUEST:
            raise InvalidRequestError(
                f"{param} asks for {count} log-probabilities of the prompt, at most "
                f"{MAX_LOGPROBS_PER_REQUEST}.",
                param,
            )


async def _keeping(
    service: Service, sampling: SamplingParams, constraint: Constraint
) -> SamplingParams:
    return replace(sampling, grammar=await service.grammars.compile(constraint))
