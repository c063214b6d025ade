"""OpenAI's endpoints: chat completions, responses, completions, models.

Parses, asks for a `Job`, hands it to `Answering`. Knows no engine and no wire format of its own.
Invariant: every error is raised before the first byte or goes through `Answering`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from loriner.adapters.names import show
from loriner.api import body, shapes
from loriner.api.access import Caller, Right
from loriner.api.answering import Answering, MakeWriter, Reply
from loriner.api.auth import GuardedRoute, Told
from loriner.api.chunks import ChunkWriter
from loriner.api.formats import ChatFormat, Head
from loriner.api.inference import Job, chat_job, text_job
from loriner.api.response_body import ResponseBody, path_of
from loriner.api.response_shapes import Response as Answered
from loriner.api.response_writer import ResponseWriter
from loriner.api.responses import json_response
from loriner.api.running import Run
from loriner.api.schema import ChatBody, CompletionBody
from loriner.api.schema_base import Body
from loriner.api.selection import choose, public_name
from loriner.api.shared import Shared
from loriner.api.text_format import TextFormat
from loriner.api.validation import renamed
from loriner.errors import AdapterNotFoundError, ModelNotFoundError

if TYPE_CHECKING:
    from loriner.adapters.records import AdapterRecord


class OpenAIDoor:
    """Handlers and routes under /v1."""

    def __init__(self, shared: Shared) -> None:
        self._service = shared.service
        self._answering = Answering(shared.service, shared.runner)
        self._max_body_bytes = shared.config.max_body_bytes

    def routes(self) -> list[GuardedRoute]:
        def route(path: str, method: str, endpoint: Callable[..., Any], told: Told) -> GuardedRoute:
            infer = Right.INFER
            return GuardedRoute(f"/v1/{path}", endpoint, right=infer, methods=[method], told=told)

        def of(asked: type[Body]) -> Told:
            return Told(body=asked, answer=shapes.Answer, streams=True)

        return [
            route("chat/completions", "POST", self.chat, of(ChatBody)),
            route("completions", "POST", self.complete, of(CompletionBody)),
            route(
                "responses",
                "POST",
                self.respond,
                Told(body=ResponseBody, answer=Answered, streams=True),
            ),
            route("models", "GET", self.list_models, Told(answer=shapes.ModelList)),
            route("models/{name:path}", "GET", self.get_model, Told(answer=shapes.Model)),
        ]

    async def chat(self, request: Request) -> Reply:
        chat = await body.parse(request, ChatBody, self._max_body_bytes)
        job = await chat_job(self._service, chat, *_asker(request))

        def make(run: Run, origin: shapes.Origin) -> ChunkWriter:
            return ChunkWriter(run, origin, chat, lambda head: ChatFormat(head, job.prompts[0]))

        return self._reply(job, make, chat.stream)

    async def complete(self, request: Request) -> Reply:
        completion = await body.parse(request, CompletionBody, self._max_body_bytes)
        job = await text_job(self._service, completion, *_asker(request))

        def form(head: Head) -> TextFormat:
            return TextFormat(head, job.prompts, job.sampling.n)

        def make(run: Run, origin: shapes.Origin) -> ChunkWriter:
            return ChunkWriter(run, origin, completion, form)

        return self._reply(job, make, completion.stream)

    async def respond(self, request: Request) -> Reply:
        """Answer a conversation in the way of OpenAI's Responses; nothing is stored."""
        asked = await body.parse(request, ResponseBody, self._max_body_bytes)
        places: dict[str, str] = {}

        def names() -> AbstractContextManager[None]:
            return renamed(lambda param: path_of(param, places))

        with names():
            chat = asked.chat(places)
            job = await chat_job(self._service, chat, *_asker(request), kind="resp")

        def make(run: Run, origin: shapes.Origin) -> ResponseWriter:
            return ResponseWriter(run, origin, asked, chat)

        async def work(send: Send) -> None:
            with names():
                await self._answering.answer(job, make, send, stream=asked.stream)

        return Reply(work)

    def _reply(self, job: Job, make: MakeWriter, stream: bool) -> Reply:
        return Reply(lambda send: self._answering.answer(job, make, send, stream=stream))

    async def list_models(self, request: Request) -> Response:
        caller = request.state.caller
        records = await asyncio.to_thread(self._service.store.list, caller.own_tenant)
        adapters = [self._model_of(record) for record in records]
        return json_response(shapes.ModelList([self._base(), *adapters]))

    async def get_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        choice = choose(name, None, self._service.model_name)
        if choice.name is None:
            return json_response(self._base())
        try:
            full = request.state.caller.reach(choice.name)
            record = await asyncio.to_thread(self._service.store.resolve, full)
        except AdapterNotFoundError:
            raise ModelNotFoundError(show(name)) from None
        return json_response(self._model_of(record))

    def _base(self) -> shapes.Model:
        return shapes.Model(
            id=self._service.model_name,
            created=self._service.created,
            owned_by="loriner",
            root=self._service.base_digest,
            parent=None,
            max_model_len=self._service.max_model_len,
        )

    def _model_of(self, record: AdapterRecord) -> shapes.Model:
        return shapes.Model(
            id=public_name(record),
            created=int(record.created_at),
            owned_by=record.name.partition("/")[0],
            root=record.generation,
            parent=self._service.model_name,
            max_model_len=self._service.max_model_len,
        )


def _asker(request: Request) -> tuple[Caller, str]:
    return request.state.caller, request.state.request_id
