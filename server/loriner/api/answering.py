"""Runs one inference request for a door: start, first event, stream or gather, close.

Knows the Service's `generate` and nothing of chat or text. Invariant: whatever ends the request
(finish, error, disconnect, shutdown), every Generation it opened is closed, and nothing is sent
before the first event.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.types import Receive, Scope, Send

from loriner.api import shapes, sse
from loriner.api.formats import Format, Gathered, Head
from loriner.api.metrics import Metrics, RequestMeter
from loriner.api.prompts import Prompt
from loriner.api.schema import SamplingBody
from loriner.api.selection import Choice, public_name
from loriner.api.status import error_body, row_of
from loriner.core import Event, FinishReason, SamplingParams
from loriner.errors import (
    AdapterNotFoundError,
    EngineFailedError,
    EngineUnavailableError,
    LorinerError,
)

if TYPE_CHECKING:
    from loriner.engine.generation import Generation
    from loriner.engine.service import Service

Numbered = tuple[int, Event]  # with the prompt's or the choice's index

logger = logging.getLogger("loriner.api")


@dataclass(frozen=True, slots=True)
class Job:
    """One validated request."""

    kind: str  # "chatcmpl" or "cmpl", the prefix of its id
    prompts: Sequence[Prompt]
    prompt_param: str
    sampling: SamplingParams
    choice: Choice
    body: SamplingBody
    tenant: str
    request_id: str
    make_format: Callable[[Head], Format]

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.sampling.n


class Reply:
    """A response that is worked out while it is sent, and dropped when the client goes away."""

    def __init__(self, work: Callable[[Send], Coroutine[Any, Any, None]]) -> None:
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._work(send))


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end, or cancel it the moment the client disconnects."""
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.wait({worker, watcher})
    if not worker.cancelled():
        worker.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Answering:
    """Starts generations and writes their answer; shared by all inference endpoints."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service = service
        self._metrics = metrics

    async def run(self, job: Job, send: Send) -> None:
        """Raises LorinerError as long as nothing was sent."""
        with self._metrics.request(job.kind) as meter:
            async with AsyncExitStack() as stack:
                run = await self._start(job, stack, meter)
                first = await anext(run.events, None)
                if first is None:
                    raise EngineFailedError("The engine answered nothing.")
                _raise_if_aborted(first[1])
                answer = run.format(first[1], self._service)
                if job.body.stream:
                    await self._stream(run, first, answer, send)
                else:
                    await self._gather(run, first, answer, send)

    async def _start(self, job: Job, stack: AsyncExitStack, meter: RequestMeter) -> Run:
        answer_id = f"{job.kind}-{uuid.uuid4().hex}"
        generations = []
        for i, prompt in enumerate(job.prompts):
            generation = await self._admit(job, prompt, f"{answer_id}-{i}")
            stack.push_async_callback(generation.close)
            generations.append(generation)
        record = generations[0].record
        name, digest = ("", "") if record is None else (public_name(record), record.generation)
        meter.admitted(name, digest, sum(len(prompt.ids) for prompt in job.prompts))
        events = await stack.enter_async_context(aclosing(_merge(generations)))
        return Run(job, answer_id, int(time.time()), generations, events, meter)

    async def _admit(self, job: Job, prompt: Prompt, request_id: str) -> Generation:
        try:
            return await self._service.generate(
                prompt.ids,
                job.sampling,
                adapter=job.choice.name,
                request_id=request_id,
                tenant=job.tenant,
                prompt_param=job.prompt_param,
            )
        except AdapterNotFoundError:
            raise job.choice.not_found() from None

    async def _stream(self, run: Run, first: Numbered, answer: Format, send: Send) -> None:
        stream = sse.EventStream(send)
        await stream.start(run.headers())
        options = run.job.body.stream_options
        include_usage = bool(options and options.include_usage)
        try:
            opening = answer.opening(run.job.num_choices)
            await stream.write(b"".join(run.encode(chunk, include_usage) for chunk in opening))
            async for index, event in run.all_events(first):
                chunk = answer.chunk(index, event)
                if chunk is not None:
                    await stream.write(run.encode(chunk, include_usage))
            closing = sse.encode(answer.closing(run.usage())) if include_usage else b""
            await stream.close(closing + sse.DONE)
        except Exception as error:
            logger.error("request %s failed after its first byte: %r", run.job.request_id, error)
            await stream.close(sse.encode(error_body(error, run.job.request_id)))
            run.meter.failed(row_of(error).status)
            if not isinstance(error, LorinerError):
                raise

    async def _gather(self, run: Run, first: Numbered, answer: Format, send: Send) -> None:
        choices = [Gathered() for _ in range(run.job.num_choices)]
        async for index, event in run.all_events(first):
            choices[index].add(event)
        body = msgspec.json.encode(answer.whole(choices, run.usage()))
        headers = [(b"content-type", b"application/json"), *run.headers()]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Run:
    """One job while it runs: its merged events and what they add up to."""

    def __init__(
        self,
        job: Job,
        answer_id: str,
        created: int,
        generations: Sequence[Generation],
        events: AsyncGenerator[Numbered, None],
        meter: RequestMeter,
    ) -> None:
        self.job = job
        self.events = events
        self.meter = meter
        self._answer_id = answer_id
        self._created = created
        self._record = generations[0].record
        self._prompt_tokens = [len(prompt.ids) for prompt in job.prompts]
        self._cached_tokens = [0] * len(job.prompts)
        self._output_tokens = [0] * job.num_choices

    def format(self, first: Event, service: Service) -> Format:
        record = self._record
        origin = shapes.Origin(
            adapter=None if record is None else record.name,
            generation=None if record is None else record.generation,
            base_digest=service.base_digest,
            cold_start=first.cold_start,
        )
        head = Head(
            answer_id=self._answer_id,
            created=self._created,
            model=service.model_name if record is None else self.job.choice.name or record.name,
            fingerprint=f"fp_{service.base_digest[:12]}",
            origin=origin,
            logprobs=self.job.sampling.logprobs is not None,
            token_ids=self.job.body.return_token_ids,
        )
        return self.job.make_format(head)

    async def all_events(self, first: Numbered) -> AsyncIterator[Numbered]:
        """(choice index, event), counted; raises when an event says that its sequence failed."""
        yield self._count(*first)
        async for prompt, event in self.events:
            yield self._count(prompt, event)

    def _count(self, prompt: int, event: Event) -> tuple[int, Event]:
        _raise_if_aborted(event)
        index = prompt * self.job.sampling.n + event.index
        if event.index == 0:  # other choices find the first one's prompt in the cache
            self._cached_tokens[prompt] = event.num_cached_tokens
        self._output_tokens[index] = event.num_output_tokens
        self.meter.event(index, event)
        return index, event

    def usage(self) -> shapes.Usage:
        prompt, output = sum(self._prompt_tokens), sum(self._output_tokens)
        return shapes.Usage(
            prompt_tokens=prompt,
            completion_tokens=output,
            total_tokens=prompt + output,
            prompt_tokens_details=shapes.PromptTokens(sum(self._cached_tokens)),
            completion_tokens_details=shapes.CompletionTokens(),
        )

    def encode(self, chunk: shapes.Answer, include_usage: bool) -> bytes:
        if include_usage:
            options = self.job.body.stream_options
            chunk.usage = self.usage() if options and options.continuous_usage_stats else None
        return sse.encode(chunk)

    def headers(self) -> list[tuple[bytes, bytes]]:
        generation = "base" if self._record is None else self._record.generation
        return [(b"x-loriner-generation", generation.encode())]


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
