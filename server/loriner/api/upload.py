"""A multipart upload, streamed to a folder: never a file in memory, never a name of the sender's on
disk.

Knows fields and boundaries; files are `incoming`'s. Invariant: an upload without its closing
boundary is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import Request

from loriner.adapters.names import parse_name
from loriner.api.body import check_length, too_large
from loriner.api.incoming import Incoming
from loriner.errors import InvalidRequestError

FIELDS = ("name", "expected_generation")
MAX_FIELD_BYTES = 256
MAX_PARTS = 16
IDLE_TIMEOUT_S = 60.0
_FEED_BYTES = 1 << 20  # parsed and written in one go, in a thread


@dataclass(slots=True)
class Upload:
    """What arrived. Files lie in the folder under the names given here."""

    fields: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)


async def receive(request: Request, folder: Path, max_bytes: int) -> Upload:
    """Stream the body of `request` into `folder`.

    Raises InvalidRequestError (malformed, cut, unknown part), PayloadTooLargeError,
    ClientDisconnect.
    """
    check_length(request, max_bytes)
    reader = PartReader(_boundary(request), Incoming(folder, max_bytes))
    size, pending = 0, bytearray()
    try:
        async with aclosing(request.stream()) as stream:
            while chunk := await _next_chunk(stream):
                size += len(chunk)
                if size > max_bytes:
                    raise too_large(max_bytes)
                pending += chunk
                if len(pending) >= _FEED_BYTES:
                    await asyncio.to_thread(reader.feed, bytes(pending))
                    pending.clear()
        await asyncio.to_thread(reader.feed, bytes(pending))
    finally:
        reader.close()
    return reader.finish()


async def _next_chunk(stream: AsyncGenerator[bytes, None]) -> bytes:
    try:
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            return await anext(stream, b"")
    except TimeoutError:
        raise HTTPException(408, "The upload stopped arriving.") from None


def _boundary(request: Request) -> bytes:
    _, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise InvalidRequestError("The multipart Content-Type names no boundary.")
    return boundary


class PartReader:
    """Feeds the multipart parser and writes what it finds. Used from one thread at a time."""

    def __init__(self, boundary: bytes, incoming: Incoming) -> None:
        self._incoming = incoming
        self._upload = Upload(files=incoming.names)
        self._num_parts = 0
        self._ended = False
        self._header_name, self._header_value = b"", b""
        self._disposition = b""
        self._field: str | None = None
        self._value = bytearray()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._add_header_name,
                    "on_header_value": self._add_header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._open,
                    "on_part_data": self._write,
                    "on_part_end": self._end,
                    "on_end": self._finish,
                },
            )
        except FormParserError as error:
            raise InvalidRequestError(f"The multipart body is malformed: {error}") from None

    def feed(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequestError(f"The multipart body is malformed: {error}") from None

    def finish(self) -> Upload:
        if not self._ended:
            raise InvalidRequestError("The upload was cut: its closing boundary is missing.")
        return self._upload

    def close(self) -> None:
        self._incoming.close()

    def _begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidRequestError(f"The upload has more than {MAX_PARTS} parts.")
        self._disposition = b""
        self._field = None

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name, self._header_value = b"", b""

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name in FIELDS:
            self._field, self._value = name, bytearray()
            return
        if name in ("file", "files"):
            name = options.get(b"filename", b"").decode("utf-8", "replace")
        self._incoming.begin(name)

    def _write(self, data: bytes, start: int, end: int) -> None:
        if self._incoming.is_open:
            self._incoming.write(memoryview(data)[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise InvalidRequestError(f"{self._field} is too long.", self._field)

    def _end(self) -> None:
        if self._incoming.is_open:
            self._incoming.end()
        elif self._field is not None:
            value = self._value.decode("utf-8", "replace").strip()
            if self._upload.fields.setdefault(self._field, value) != value:
                raise InvalidRequestError(f"{self._field} is there twice.", self._field)
            if self._field == "name":
                parse_name(value)  # refuse a bad name before the weights arrive

    def _finish(self) -> None:
        self._ended = True
