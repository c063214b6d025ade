"""Server-sent events: bytes on the wire, and nothing about what they mean.

Invariant: `start` is the first thing sent and happens once; an error found earlier still has a
status code.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from starlette.types import Send

DONE = b"data: [DONE]\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


def encode(payload: object) -> bytes:
    """One event. JSON has no raw newline, so a payload can never break the framing."""
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


class EventStream:
    """Writes one response of events through ASGI `send`."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def start(self, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        await self._send(
            {"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *headers]}
        )

    async def write(self, data: bytes) -> None:
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def close(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": False})
