"""The gRPC door to adapters. Operations are `adapters`'; files arrive through `incoming`.

Invariant: an upload whose digests do not match, or that was cut, leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from grpc import aio

from loriner.adapters.names import show
from loriner.api import grpc_answers
from loriner.api.adapters import Adapters
from loriner.api.grpc_guard import current_call
from loriner.api.grpc_requests import refuse_unknown
from loriner.api.incoming import Incoming
from loriner.api.shared import Shared
from loriner.errors import InvalidRequestError, PayloadTooLargeError
from loriner_proto.v1 import adapters_pb2 as pb
from loriner_proto.v1 import adapters_pb2_grpc

MAX_CHUNK_BYTES = 1 << 20
MAX_PAGE = 1000
IDLE_TIMEOUT_S = 60.0

Context = aio.ServicerContext[Any, Any]


class AdapterServicer(adapters_pb2_grpc.AdapterServiceServicer):
    def __init__(self, shared: Shared) -> None:
        self._adapters: Adapters = shared.adapters
        self._max_bytes = shared.config.max_upload_bytes

    async def Upload(
        self, parts: AsyncIterator[pb.UploadRequest], context: Context
    ) -> pb.UploadResponse:
        caller = current_call().caller
        async with self._adapters.upload(caller) as folder:
            upload = Upload(folder, self._max_bytes)
            try:
                while (part := await _next(parts)) is not None:
                    await asyncio.to_thread(upload.feed, part)
                header = upload.finish()
            finally:
                upload.close()
            expected = header.expected_generation if _has_expected(header) else None
            return grpc_answers.published(
                await self._adapters.publish_files(
                    caller, folder, upload.names, header.name, expected
                )
            )

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        placed, history = await self._adapters.get(current_call().caller, request.name)
        return pb.GetResponse(
            adapter=grpc_answers.adapter(placed),
            history=[grpc_answers.record(record) for record in history],
        )

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        if not 0 <= request.page_size <= MAX_PAGE:
            raise InvalidRequestError(f"page_size must be in [0, {MAX_PAGE}].", "page_size")
        found = await self._adapters.all_of(current_call().caller)
        found = [placed for placed in found if placed.record.name > request.page_token]
        page = found[: request.page_size or MAX_PAGE]
        return pb.ListResponse(
            adapters=[grpc_answers.adapter(placed) for placed in page],
            next_page_token=page[-1].record.name if len(page) < len(found) else "",
        )

    async def Alias(self, request: pb.AliasRequest, context: Context) -> pb.AliasResponse:
        expected = request.expected_generation if _has_expected(request) else None
        record = await self._adapters.set_alias(
            current_call().caller, request.name, request.target, expected
        )
        return pb.AliasResponse(adapter=grpc_answers.adapter(self._adapters.place(record)))

    async def Pin(self, request: pb.PinRequest, context: Context) -> pb.PinResponse:
        record = await self._adapters.set_pinned(
            current_call().caller, request.name, request.pinned
        )
        return pb.PinResponse(adapter=grpc_answers.adapter(self._adapters.place(record)))

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse:
        expected = request.expected_generation if _has_expected(request) else None
        record = await self._adapters.delete(current_call().caller, request.name, expected)
        return pb.DeleteResponse(adapter=grpc_answers.record(record))

    async def Evict(self, request: pb.EvictRequest, context: Context) -> pb.EvictResponse:
        record = await self._adapters.evict(current_call().caller, request.name)
        return pb.EvictResponse(adapter=grpc_answers.adapter(self._adapters.place(record)))


class Upload:
    """One stream of parts, in order: header, then for each file its begin, chunks and end.

    `feed` and `finish` raise InvalidRequestError or PayloadTooLargeError by name.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._incoming = Incoming(folder, max_bytes)
        self._max_bytes = max_bytes
        self._header: pb.UploadHeader | None = None
        self._left = 0  # bytes of the open file
        self._digest = hashlib.sha256()

    @property
    def names(self) -> list[str]:
        return self._incoming.names

    def feed(self, part: pb.UploadRequest) -> None:
        refuse_unknown(part)
        kind = part.WhichOneof("part")
        if (kind == "header") != (self._header is None):
            raise InvalidRequestError("An upload has one header, as its first part.", "header")
        if kind == "header":
            self._header = part.header
        elif kind == "file":
            self._begin(part.file)
        elif kind == "chunk":
            self._add(part.chunk)
        elif kind == "file_end":
            self._end(part.file_end.sha256)
        else:
            raise InvalidRequestError("A part of the upload is empty.", "part")

    def finish(self) -> pb.UploadHeader:
        if self._header is None or self._incoming.is_open:
            raise InvalidRequestError("The upload was cut: a file has no end.", "file_end")
        if not self._header.name:
            raise InvalidRequestError("Missing required parameter: 'header.name'.", "header.name")
        return self._header

    def close(self) -> None:
        self._incoming.close()

    def _begin(self, file: pb.UploadFile) -> None:
        if self._incoming.is_open:
            raise InvalidRequestError("A file begins before the last one has ended.", "file")
        if file.num_bytes > self._max_bytes:
            raise PayloadTooLargeError(
                f"`{show(file.name)}` has {file.num_bytes} bytes; an upload may have "
                f"{self._max_bytes}."
            )
        self._incoming.begin(file.name)
        self._left = file.num_bytes
        self._digest = hashlib.sha256()

    def _add(self, chunk: bytes) -> None:
        if not self._incoming.is_open:
            raise InvalidRequestError("A chunk belongs to no file.", "chunk")
        if len(chunk) > MAX_CHUNK_BYTES:
            raise InvalidRequestError(f"A chunk has at most {MAX_CHUNK_BYTES} bytes.", "chunk")
        self._left -= len(chunk)
        if self._left < 0:
            raise InvalidRequestError("A file is longer than its num_bytes.", "file.num_bytes")
        self._incoming.write(chunk)
        self._digest.update(chunk)

    def _end(self, sha256: bytes) -> None:
        if not self._incoming.is_open:
            raise InvalidRequestError("A file ends that did not begin.", "file_end")
        if self._left:
            raise InvalidRequestError("A file is shorter than its num_bytes.", "file.num_bytes")
        if not hmac.compare_digest(sha256, self._digest.digest()):
            raise InvalidRequestError(
                f"`{self.names[-1]}` arrived with another SHA-256 than its sender says.",
                "file_end.sha256",
            )
        self._incoming.end()


async def _next(parts: AsyncIterator[pb.UploadRequest]) -> pb.UploadRequest | None:
    try:
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            return await anext(parts, None)
    except TimeoutError:
        raise InvalidRequestError("The upload stopped arriving.", "part") from None


def _has_expected(message: Any) -> bool:
    return bool(message.HasField("expected_generation"))
