"""What both doors ask for: a validated body -> a `Job` that `running` can run.

Knows the schema and the Service's tokenizer; no door and no wire format. Invariant: every field of
a body has been checked before anything is tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loriner.api import prompts
from loriner.api.access import Caller
from loriner.api.prompts import Prompt
from loriner.api.schema import ChatBody, CompletionBody, EmbeddingBody, SamplingBody
from loriner.api.selection import Choice, choose
from loriner.api.tool_calling import ToolCalling
from loriner.api.tool_formats import format_of
from loriner.core import SamplingParams
from loriner.engine.admission import MAX_LOGPROBS_PER_REQUEST
from loriner.errors import InvalidRequestError

if TYPE_CHECKING:
    from loriner.engine.service import Service


@dataclass(frozen=True, slots=True)
class Job:
    """One validated request."""

    kind: str  # "chatcmpl", "cmpl" or "embd", the prefix of its id
    prompts: Sequence[Prompt]
    prompt_param: str
    sampling: SamplingParams
    choice: Choice
    caller: Caller
    request_id: str
    priority: int
    calling: ToolCalling | None = None  # None: no tool may be called
    embeds: bool = False  # each prompt becomes a vector; `sampling` says nothing then

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.sampling.n


async def chat_job(service: Service, body: ChatBody, caller: Caller, request_id: str) -> Job:
    """Raises InvalidRequestError, ModelNotFoundError."""
    sampling = await _sampling(service, body)
    calling = await tool_calling(service, body)
    if calling is not None:
        sampling = await calling.constrain(service, sampling)
    choice = choose(body.model, body.adapters(), service.model_name)
    prompt = await prompts.from_chat(service, body, calling)
    _check_prompt_logprobs(body, [prompt])
    return Job(
        "chatcmpl",
        [prompt],
        "messages",
        sampling,
        choice,
        caller,
        request_id,
        body.priority,
        calling,
    )


async def tool_calling(service: Service, body: ChatBody) -> ToolCalling | None:
    """None when nothing may be called. Raises InvalidRequestError."""
    use = body.tool_use()
    if use is None:
        return None
    return ToolCalling(use, format_of(await prompts.template_of(service), service.tool_format))


async def text_job(service: Service, body: CompletionBody, caller: Caller, request_id: str) -> Job:
    """Raises InvalidRequestError, ModelNotFoundError."""
    sampling = await _sampling(service, body)
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


async def _sampling(service: Service, body: SamplingBody) -> SamplingParams:
    """With the grammar, when the answer has one."""
    sampling, constraint = body.sampling(), body.constraint()
    if constraint is None:
        return sampling
    return replace(sampling, grammar=await service.grammars.compile(constraint))
