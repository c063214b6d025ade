"""Writes the answer of one job over HTTP: streamed as events, or in one piece.

Knows ASGI; what is written is a `Writer`'s, running is `running`'s. Invariant: nothing is sent
before the first event, and an error after the first byte is an event of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from msgspec import Struct
from starlette.types import Receive, Scope, Send

from loriner.api import shapes, sse
from loriner.api.formats import Gathered
from loriner.api.inference import Job
from loriner.api.running import Run, Runner
from loriner.api.status import row_of
from loriner.api.voice import Said
from loriner.errors import LorinerError

if TYPE_CHECKING:
    from loriner.engine.service import Service

logger = logging.getLogger("loriner.api")


class Writer(Protocol):
    """One answer as bytes, in the form of one API."""

    def opening(self) -> bytes:
        """Events sent before the first token's own."""

    def part(self, said: Said) -> bytes:
        """The events for what was said; empty when there is nothing to show yet."""

    def closing(self) -> bytes:
        """The events after the last token."""

    def failure(self, error: Exception) -> bytes:
        """The last event of a stream that failed."""

    def whole(self, choices: Sequence[Gathered]) -> Struct:
        """The body of an answer that is not streamed."""


MakeWriter = Callable[[Run, shapes.Origin], Writer]


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

    async def answer(self, job: Job, make: MakeWriter, send: Send, *, stream: bool) -> None:
        """Raises LorinerError as long as nothing was sent."""
        async with self._runner.run(job) as run:
            writer = make(run, origin_of(run, self._service))
            await (self._stream if stream else self._gather)(run, writer, send)

    async def _stream(self, run: Run, writer: Writer, send: Send) -> None:
        stream = sse.EventStream(send)
        await stream.start(_headers(run))
        try:
            await stream.write(writer.opening())
            async for said in run.said():
                await stream.write(writer.part(said))
            await stream.close(writer.closing())
        except Exception as error:
            logger.error("request %s failed after its first byte: %r", run.job.request_id, error)
            await stream.close(writer.failure(error))
            run.meter.failed(row_of(error).status)
            if not isinstance(error, LorinerError):
                raise

    async def _gather(self, run: Run, writer: Writer, send: Send) -> None:
        choices = [Gathered() for _ in range(run.job.num_choices)]
        async for said in run.said():
            choices[said.index].add(said)
        await send_json(run, msgspec.json.encode(writer.whole(choices)), send)


async def send_json(run: Run, body: bytes, send: Send) -> None:
    """An answer in one piece."""
    headers = [(b"content-type", b"application/json"), *_headers(run)]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def origin_of(run: Run, service: Service) -> shapes.Origin:
    return shapes.Origin(
        adapter=None if run.record is None else run.record.name,
        generation=run.generation,
        base_digest=service.base_digest,
        cold_start=run.cold_start,
    )


def _headers(run: Run) -> list[tuple[bytes, bytes]]:
    return [(b"x-loriner-generation", (run.generation or "base").encode())]
