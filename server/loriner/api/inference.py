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
from loriner.api.schema import ChatBody, CompletionBody, SamplingBody
from loriner.api.selection import Choice, choose
from loriner.api.tool_calling import ToolCalling
from loriner.api.tool_formats import format_of
from loriner.core import SamplingParams

if TYPE_CHECKING:
    from loriner.engine.service import Service


@dataclass(frozen=True, slots=True)
class Job:
    """One validated request."""

    kind: str  # "chatcmpl", "cmpl" or "resp", the prefix of its id
    prompts: Sequence[Prompt]
    prompt_param: str
    sampling: SamplingParams
    choice: Choice
    caller: Caller
    request_id: str
    priority: int
    calling: ToolCalling | None = None  # None: no tool may be called

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.sampling.n


async def chat_job(
    service: Service, body: ChatBody, caller: Caller, request_id: str, kind: str = "chatcmpl"
) -> Job:
    """Raises InvalidRequestError, ModelNotFoundError."""
    sampling = await _sampling(service, body)
    calling = await tool_calling(service, body)
    if calling is not None:
        sampling = await calling.constrain(service, sampling)
    choice = choose(body.model, body.adapters(), service.model_name)
    prompt = await prompts.from_chat(service, body, calling)
    return Job(
        kind,
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
    return Job("cmpl", entries, "prompt", sampling, choice, caller, request_id, body.priority)


async def _sampling(service: Service, body: SamplingBody) -> SamplingParams:
    """With the grammar, when the answer has one."""
    sampling, constraint = body.sampling(), body.constraint()
    if constraint is None:
        return sampling
    return replace(sampling, grammar=await service.grammars.compile(constraint))
