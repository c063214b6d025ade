"""Runs one inference job for a door: start, first event, all events, close.

Knows the Service's `generate`, and no door. Invariant: whatever ends the
job (finish, error, disconnect, deadline, shutdown), every Generation it opened is closed, and a
door gets its `Run` with the first event, so that an error before it still has a status.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from loriner.adapters.mixture import Mixture, Served
from loriner.api.inference import Job
from loriner.api.metrics import Metrics, RequestMeter
from loriner.api.prompts import Prompt
from loriner.api.quotas import Quotas, Spend
from loriner.api.selection import public_name
from loriner.api.voice import Said, Voice
from loriner.core import Event, FinishReason, Scaled, TokenLogprob, Turn
from loriner.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    EngineFailedError,
    EngineUnavailableError,
)

if TYPE_CHECKING:
    from loriner.engine.generation import Generation
    from loriner.engine.service import Service

Numbered = tuple[int, Event]  # with the prompt's index


class Runner:
    """Starts generations for both doors."""

    def __init__(self, service: Service, metrics: Metrics, quotas: Quotas) -> None:
        self._service = service
        self._metrics = metrics
        self._quotas = quotas

    @asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator[Run]:
        """The job, with its first event here. Raises LorinerError before that."""
        at_once = self._at_once(job)
        with (
            self._metrics.request(job.kind) as meter,
            self._quotas.running(job.caller.tenant, at_once * job.sampling.n) as spend,
        ):
            async with AsyncExitStack() as stack:
                answer_id = f"{job.kind}-{uuid.uuid4().hex}"
                begun = await self._begin(job, answer_id, range(at_once), stack)
                record = begun[0].record
                _count_prompts(job, record, meter, spend)
                merged = self._merged(job, answer_id, begun)
                events = await stack.enter_async_context(aclosing(merged))
                first = await anext(events, None)
                if first is None:
                    raise EngineFailedError("The engine answered nothing.")
                _raise_if_aborted(first[1])
                base = self._service.model_name
                yield Run(job, answer_id, record, first, events, meter, spend, base)

    def _at_once(self, job: Job) -> int:
        """How many prompts are queued at a time: of those to embed, which may be very many, what
        can run in one step."""
        if not job.embeds:
            return len(job.prompts)
        most = self._quotas.max_sequences(job.caller.tenant)
        room = self._service.engine_config.max_sequences
        return min(len(job.prompts), room if most is None else max(1, min(most, room)))

    async def _begin(
        self,
        job: Job,
        answer_id: str,
        places: Iterable[int],
        stack: AsyncExitStack,
        asked: Sequence[Scaled] | None = None,
    ) -> list[Generation]:
        """Admit these prompts, all on what the first of them resolves to; `stack` closes them."""
        begun: list[Generation] = []
        for i in places:
            generation = await self._admit(job, job.prompts[i], f"{answer_id}-{i}", asked)
            stack.push_async_callback(generation.close)
            begun.append(generation)
            asked = _same(generation.record)
        return begun

    async def _merged(
        self, job: Job, answer_id: str, begun: Sequence[Generation]
    ) -> AsyncGenerator[Numbered, None]:
        """(prompt index, event) of all prompts, those that were not queued yet after the others."""
        async with aclosing(_merge(begun)) as events:
            async for numbered in events:
                yield numbered
        size, asked = len(begun), _same(begun[0].record)
        for start in range(size, len(job.prompts), size):
            places = range(start, min(start + size, len(job.prompts)))
            async with AsyncExitStack() as stack:
                more = await self._begin(job, answer_id, places, stack, asked)
                events = await stack.enter_async_context(aclosing(_merge(more)))
                async for i, event in events:
                    yield start + i, event

    async def _admit(
        self, job: Job, prompt: Prompt, request_id: str, same: Sequence[Scaled] | None
    ) -> Generation:
        caller, asked = job.caller, job.choice.named()
        adapters = [Scaled(job.templated or caller.reach(name), scale) for name, scale in asked]
        try:
            generation = await self._service.generate(
                prompt.ids,
                job.sampling,
                adapter=adapters if same is None else same,
                request_id=request_id,
                tenant=job.caller.tenant,
                turn=Turn(self._quotas.weight(job.caller.tenant), job.priority),
                prompt_param=job.prompt_param,
                embeds=job.embeds,
            )
        except AdapterNotFoundError as error:
            raise job.choice.not_found(error.name) from None
        record = generation.record
        if job.is_chat and record is not None and record.has_template and not job.templated:
            await generation.close()
            raise AdapterConflictError("The adapter's chat template came meanwhile: ask again.")
        return generation


class Run:
    """One job while it runs: its merged events and what they add up to."""

    def __init__(
        self,
        job: Job,
        answer_id: str,
        record: Served | None,
        first: Numbered,
        events: AsyncGenerator[Numbered, None],
        meter: RequestMeter,
        spend: Spend,
        base: str,
    ) -> None:
        self.job = job
        self.answer_id = answer_id
        self.record = record  # of the adapter; None for the base
        self.created = int(time.time())
        self.cold_start = first[1].cold_start
        self.meter = meter
        self._first, self._rest, self._spend, self._base = first, events, spend, base
        self._cached_tokens = [0] * len(job.prompts)
        self._output_tokens = [0] * job.num_choices
        self._voices = [Voice(i, job.thinking, job.calling) for i in range(job.num_choices)]

    @property
    def generation(self) -> str | None:
        """The digest that answers; None for the base."""
        return None if self.record is None else self.record.generation

    @property
    def model(self) -> str:
        """What answers, as it was asked for; the name of the base where no adapter was."""
        return self._base if self.record is None else self.job.choice.name or self.record.name

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Of a single prompt: its first event has them."""
        return self._first[1].prompt_logprobs

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.job.prompts)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, found in the KV cache so far."""
        return sum(self._cached_tokens)

    @property
    def output_tokens(self) -> int:
        """So far."""
        return sum(self._output_tokens)

    @property
    def reasoning_tokens(self) -> int:
        """Of the output, so far."""
        return sum(voice.num_reasoning_tokens for voice in self._voices)

    async def said(self) -> AsyncIterator[Said]:
        """All events, read and counted; raises when one says that its sequence failed."""
        yield self._hear(*self._first)
        async for prompt, event in self._rest:
            yield self._hear(prompt, event)

    def _hear(self, prompt: int, event: Event) -> Said:
        _raise_if_aborted(event)
        index = prompt * self.job.sampling.n + event.index
        if event.index == 0:  # other choices find the first one's prompt in the cache
            self._cached_tokens[prompt] = event.num_cached_tokens
        self._output_tokens[index] = event.num_output_tokens
        self.meter.event(index, event)
        self._spend(len(event.token_ids))
        return self._voices[index].hear(event)


def _same(record: Served | None) -> list[Scaled]:
    """What asks for exactly these generations, whatever their names stand for by then."""
    if record is None:
        return []
    if not isinstance(record, Mixture):
        return [Scaled(f"{record.name}@{record.generation}")]
    parts = zip(record.records, record.scales, strict=True)
    return [Scaled(f"{one.name}@{one.generation}", scale) for one, scale in parts]


def _count_prompts(job: Job, record: Served | None, meter: RequestMeter, spend: Spend) -> None:
    num_tokens = sum(len(prompt.ids) for prompt in job.prompts)
    name = "" if record is None else public_name(record)
    meter.admitted(name, "" if record is None else record.generation, num_tokens)
    spend(num_tokens)


async def _merge(generations: Sequence[Generation]) -> AsyncGenerator[Numbered, None]:
    """(prompt index, event) of all generations, in the order in which they arrive."""
    if len(generations) == 1:
        async for event in generations[0]:
            yield 0, event
        return
    queue: asyncio.Queue[Numbered | asyncio.Task[None]] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(i, g, queue)) for i, g in enumerate(generations)]
    for pump in pumps:
        pump.add_done_callback(queue.put_nowait)
    try:
        num_open = len(pumps)
        while num_open:
            item = await queue.get()
            if isinstance(item, asyncio.Task):
                item.result()
                num_open -= 1
            else:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    prompt: int, generation: Generation, queue: asyncio.Queue[Numbered | asyncio.Task[None]]
) -> None:
    async for event in generation:
        queue.put_nowait((prompt, event))


def _raise_if_aborted(event: Event) -> None:
    if event.finish_reason is FinishReason.ABORT:
        raise EngineUnavailableError("The request was stopped because the engine stops.")
