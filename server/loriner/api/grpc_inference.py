"""The gRPC door to inference: Generate, Chat, StreamChat, Tokenize, Embed.

Reads protos and writes them; validation, running and names are below. Invariant: nothing is sent
before the first event, so that a refused call can be tried again elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grpc import aio

from loriner.api import grpc_answers, prompts
from loriner.api.embeddings import floats
from loriner.api.formats import Gathered
from loriner.api.grpc_errors import REQUEST_ID_KEY
from loriner.api.grpc_guard import current_call
from loriner.api.grpc_requests import (
    chat_body,
    completion_body,
    embedding_body,
    named_as_in_proto,
)
from loriner.api.inference import Job, chat_job, chat_tokens, embedding_job, text_job
from loriner.api.running import Run
from loriner.api.shared import Shared
from loriner.errors import InvalidRequestError
from loriner_proto.v1 import inference_pb2 as pb
from loriner_proto.v1 import inference_pb2_grpc

Context = aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Writes to the context, not as a generator: a call that is cancelled ends in one place."""

    def __init__(self, shared: Shared) -> None:
        self._service = shared.service
        self._runner = shared.runner

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        call = current_call()
        with named_as_in_proto():
            body = await completion_body(request)
            job = await text_job(self._service, body, call.caller, call.request_id)
            await self._stream(job, context, pb.GenerateResponse)

    async def StreamChat(self, request: pb.StreamChatRequest, context: Context) -> None:  # type: ignore[override]
        with named_as_in_proto("chat."):
            await self._stream(await self._chat_job(request.chat), context, pb.StreamChatResponse)

    async def Chat(self, request: pb.ChatRequest, context: Context) -> pb.ChatResponse:
        with named_as_in_proto():
            job = await self._chat_job(request)
            async with self._runner.run(job) as run:
                choices = [Gathered() for _ in range(job.num_choices)]
                async for said in run.said():
                    choices[said.index].add(said)
                await context.send_initial_metadata(_metadata(run))
                return pb.ChatResponse(
                    opening=grpc_answers.opening(run, self._service),
                    choices=[grpc_answers.choice(i, one) for i, one in enumerate(choices)],
                    usage=grpc_answers.usage(run),
                )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(
            token_ids=await self._tokenize(request), max_model_len=self._service.max_model_len
        )

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        call = current_call()
        with named_as_in_proto():
            body = await embedding_body(request)
            job = await embedding_job(self._service, body, call.caller, call.request_id)
            async with self._runner.run(job) as run:
                made = [pb.Embedding()] * job.num_choices
                async for said in run.said():
                    made[said.index] = pb.Embedding(values=floats(said.event.embedding))
                await context.send_initial_metadata(_metadata(run))
                return pb.EmbedResponse(
                    opening=grpc_answers.opening(run, self._service),
                    embeddings=made,
                    usage=grpc_answers.usage(run),
                )

    async def _tokenize(self, request: pb.TokenizeRequest) -> Sequence[int]:
        if request.HasField("chat"):
            with named_as_in_proto("chat."):
                chat = await chat_body(request.chat)
                chat.add_special_tokens = request.add_special_tokens
                return await chat_tokens(self._service, chat, current_call().caller)
        if not request.HasField("text"):
            raise InvalidRequestError("Give either `text` or `chat`.", "input")
        special = request.add_special_tokens or not request.HasField("add_special_tokens")
        return await prompts.from_text(self._service, request.text, special)

    async def _chat_job(self, request: pb.ChatRequest) -> Job:
        call = current_call()
        body = await chat_body(request)
        return await chat_job(self._service, body, call.caller, call.request_id)

    async def _stream(self, job: Job, context: Context, part: Callable[..., Any]) -> None:
        async with self._runner.run(job) as run:
            await context.send_initial_metadata(_metadata(run))
            await context.write(part(opening=grpc_answers.opening(run, self._service)))
            async for said in run.said():
                await context.write(part(delta=grpc_answers.delta(said)))
            await context.write(part(usage=grpc_answers.usage(run)))


def _metadata(run: Run) -> tuple[tuple[str, str], ...]:
    return (
        (REQUEST_ID_KEY, run.job.request_id),
        ("x-loriner-generation", run.generation or "base"),
    )
