"""Writes the answer of one job over HTTP: streamed as events, or in one piece.

Knows ASGI and formats; running is `running`'s. Invariant: nothing is sent before the first event,
and an error after the first byte is an event of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.types import Receive, Scope, Send

from loriner.api import shapes, sse
from loriner.api.formats import Format, Gathered, Head
from loriner.api.inference import Job
from loriner.api.running import Run, Runner
from loriner.api.schema import SamplingBody
from loriner.api.status import error_body, row_of
from loriner.errors import LorinerError

if TYPE_CHECKING:
    from loriner.engine.service import Service

logger = logging.getLogger("loriner.api")


@dataclass(frozen=True, slots=True)
class Look:
    """How the caller wants to see the answer."""

    body: SamplingBody
    make_format: Callable[[Head], Format]

    @property
    def include_usage(self) -> bool:
        options = self.body.stream_options
        return bool(options and options.include_usage)

    @property
    def usage_everywhere(self) -> bool:
        options = self.body.stream_options
        return bool(options and options.continuous_usage_stats)


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
    """Writes the answers of all inference endpoints."""

    def __init__(self, service: Service, runner: Runner) -> None:
        self._service = service
        self._runner = runner

    async def answer(self, job: Job, look: Look, send: Send) -> None:
        """Raises LorinerError as long as nothing was sent."""
        async with self._runner.run(job) as run:
            answer = look.make_format(self._head(run, look))
            if look.body.stream:
                await self._stream(run, look, answer, send)
            else:
                await self._gather(run, answer, send)

    def _head(self, run: Run, look: Look) -> Head:
        service = self._service
        return Head(
            answer_id=run.answer_id,
            created=run.created,
            model=run.model(service.model_name),
            fingerprint=f"fp_{service.base_digest[:12]}",
            origin=origin_of(run, service),
            logprobs=run.job.sampling.logprobs is not None,
            token_ids=look.body.return_token_ids,
            prompt_top=look.body.prompt_logprobs,
            echoed_top=look.body.echoed_logprobs(),
            prompt_logprobs=run.prompt_logprobs,
        )

    async def _stream(self, run: Run, look: Look, answer: Format, send: Send) -> None:
        stream = sse.EventStream(send)
        await stream.start(_headers(run))
        try:
            opening = answer.opening(run.job.num_choices)
            await stream.write(b"".join(_encode(run, look, chunk) for chunk in opening))
            async for index, event in run.events():
                chunk = answer.chunk(index, event)
                if chunk is not None:
                    await stream.write(_encode(run, look, chunk))
            closing = sse.encode(answer.closing(_usage(run))) if look.include_usage else b""
            await stream.close(closing + sse.DONE)
        except Exception as error:
            logger.error("request %s failed after its first byte: %r", run.job.request_id, error)
            await stream.close(sse.encode(error_body(error, run.job.request_id)))
            run.meter.failed(row_of(error).status)
            if not isinstance(error, LorinerError):
                raise

    async def _gather(self, run: Run, answer: Format, send: Send) -> None:
        choices = [Gathered() for _ in range(run.job.num_choices)]
        async for index, event in run.events():
            choices[index].add(event)
        body = msgspec.json.encode(answer.whole(choices, _usage(run)))
        await send_json(run, body, send)


async def send_json(run: Run, body: bytes, send: Send) -> None:
    """An answer in one piece."""
    headers = [(b"content-type", b"application/json"), *_headers(run)]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def origin_of(run: Run, service: Service) -> shapes.Origin:
    record = run.record
    return shapes.Origin(
        adapter=None if record is None else record.name,
        generation=run.generation,
        base_digest=service.base_digest,
        cold_start=run.cold_start,
    )


def _usage(run: Run) -> shapes.Usage:
    prompt, output = run.prompt_tokens, run.output_tokens
    return shapes.Usage(
        prompt_tokens=prompt,
        completion_tokens=output,
        total_tokens=prompt + output,
        prompt_tokens_details=shapes.PromptTokens(run.cached_tokens),
        completion_tokens_details=shapes.CompletionTokens(),
    )


def _encode(run: Run, look: Look, chunk: shapes.Answer) -> bytes:
    if look.include_usage:
        chunk.usage = _usage(run) if look.usage_everywhere else None
    return sse.encode(chunk)


def _headers(run: Run) -> list[tuple[bytes, bytes]]:
    return [(b"x-loriner-generation", (run.generation or "base").encode())]
