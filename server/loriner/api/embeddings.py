"""Texts to vectors, in OpenAI's shape: POST /v1/embeddings.

Parses, asks for a `Job`, writes what its events bring. Knows no engine. Invariant: entries come in
the order of the inputs, whatever the order in which they are done.
"""

from __future__ import annotations

import base64
import sys
from array import array
from typing import cast

import msgspec
from starlette.requests import Request
from starlette.types import Send

from loriner.api import body, shapes
from loriner.api.access import Right
from loriner.api.answering import Reply, origin_of, send_json
from loriner.api.auth import GuardedRoute, Told
from loriner.api.inference import Job, embedding_job
from loriner.api.running import Run
from loriner.api.schema import EmbeddingBody
from loriner.api.shared import Shared


class EmbeddingDoor:
    """The handler and its route."""

    def __init__(self, shared: Shared) -> None:
        self._service, self._runner = shared.service, shared.runner
        self._max_body_bytes = shared.config.max_body_bytes

    def routes(self) -> list[GuardedRoute]:
        told = Told(body=EmbeddingBody, answer=shapes.EmbeddingList)
        path, right = "/v1/embeddings", Right.INFER
        return [GuardedRoute(path, self.embed, right=right, methods=["POST"], told=told)]

    async def embed(self, request: Request) -> Reply:
        asked = await body.parse(request, EmbeddingBody, self._max_body_bytes)
        caller, request_id = request.state.caller, request.state.request_id
        job = await embedding_job(self._service, asked, caller, request_id)
        return Reply(lambda send: self._answer(job, asked.encoding_format == "base64", send))

    async def _answer(self, job: Job, is_base64: bool, send: Send) -> None:
        async with self._runner.run(job) as run:
            entries = await _entries(run, is_base64)
            answer = shapes.EmbeddingList(
                id=run.answer_id,
                data=cast(list[shapes.Embedding], entries),
                model=run.model,
                usage=shapes.PromptUsage(run.prompt_tokens, run.prompt_tokens),
                loriner=origin_of(run, self._service),
            )
            await send_json(run, msgspec.json.encode(answer), send)


def floats(embedding: bytes) -> array[float]:
    """An event's vector [H]."""
    values = array("f", embedding)
    if sys.byteorder == "big":
        values.byteswap()
    return values


async def _entries(run: Run, is_base64: bool) -> list[msgspec.Raw]:
    """Each written as it comes, so that the event loop never waits for all of them."""
    entries = [msgspec.Raw()] * run.job.num_choices
    async for said in run.said():
        index, vector = said.index, said.event.embedding
        written = base64.b64encode(vector).decode() if is_base64 else floats(vector).tolist()
        entries[index] = msgspec.Raw(msgspec.json.encode(shapes.Embedding(index, written)))
    return entries
