"""OpenAI's endpoints: chat completions, completions, models.

Parses, builds a `Job`, hands it to `Answering`. Knows no engine and no wire format of its own.
Invariant: every error is raised before the first byte or goes through `Answering`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from loriner.adapters.names import show
from loriner.api import body, prompts, shapes
from loriner.api.answering import Answering, Job, Reply
from loriner.api.auth import GuardedRoute, Right
from loriner.api.formats import ChatFormat, TextFormat
from loriner.api.metrics import Metrics
from loriner.api.schema import ChatBody, CompletionBody
from loriner.api.selection import choose, public_name
from loriner.api.status import json_response
from loriner.errors import AdapterNotFoundError, ModelNotFoundError

if TYPE_CHECKING:
    from loriner.adapters.records import AdapterRecord
    from loriner.engine.service import Service


class OpenAIDoor:
    """Handlers and routes under /v1."""

    def __init__(self, service: Service, metrics: Metrics, max_body_bytes: int) -> None:
        self._service = service
        self._answering = Answering(service, metrics)
        self._max_body_bytes = max_body_bytes

    def routes(self) -> list[GuardedRoute]:
        infer = Right.INFER
        return [
            GuardedRoute("/v1/chat/completions", self.chat, right=infer, methods=["POST"]),
            GuardedRoute("/v1/completions", self.complete, right=infer, methods=["POST"]),
            GuardedRoute("/v1/models", self.list_models, right=infer, methods=["GET"]),
            GuardedRoute("/v1/models/{name:path}", self.get_model, right=infer, methods=["GET"]),
        ]

    async def chat(self, request: Request) -> Reply:
        chat = await body.parse(request, ChatBody, self._max_body_bytes)
        sampling = chat.sampling()
        prompt = await prompts.from_chat(self._service, chat)
        job = Job(
            kind="chatcmpl",
            prompts=[prompt],
            prompt_param="messages",
            sampling=sampling,
            choice=choose(chat.model, chat.adapter, self._service.model_name),
            body=chat,
            tenant=request.state.tenant,
            request_id=request.state.request_id,
            make_format=lambda head: ChatFormat(head, prompt),
        )
        return Reply(lambda send: self._answering.run(job, send))

    async def complete(self, request: Request) -> Reply:
        completion = await body.parse(request, CompletionBody, self._max_body_bytes)
        sampling = completion.sampling()
        entries = await prompts.from_completion(self._service, completion)
        job = Job(
            kind="cmpl",
            prompts=entries,
            prompt_param="prompt",
            sampling=sampling,
            choice=choose(completion.model, completion.adapter, self._service.model_name),
            body=completion,
            tenant=request.state.tenant,
            request_id=request.state.request_id,
            make_format=lambda head: TextFormat(head, entries, sampling.n),
        )
        return Reply(lambda send: self._answering.run(job, send))

    async def list_models(self, request: Request) -> Response:
        records = await asyncio.to_thread(self._service.store.list)
        adapters = [self._model_of(record) for record in records]
        return json_response(shapes.ModelList([self._base(), *adapters]))

    async def get_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        choice = choose(name, None, self._service.model_name)
        if choice.name is None:
            return json_response(self._base())
        try:
            record = await asyncio.to_thread(self._service.store.resolve, choice.name)
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
