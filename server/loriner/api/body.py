"""Reading a JSON body: bytes, then plain data, then a schema, each step bounded.

Knows no field names. Invariant: whatever the bytes are, the caller gets a LorinerError or a valid
model.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

from loriner.api.validation import validate
from loriner.errors import InvalidRequestError, PayloadTooLargeError

M = TypeVar("M", bound=BaseModel)

BODY_TIMEOUT_S = 60.0
_ON_LOOP_BYTES = 64 << 10  # larger bodies are parsed in a thread


async def read(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises PayloadTooLargeError as soon as it is known to pass `max_bytes`."""
    check_length(request, max_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise too_large(max_bytes)
                chunks.append(chunk)
    except TimeoutError:
        raise HTTPException(408, "The request body did not arrive in time.") from None
    return b"".join(chunks)


def check_length(request: Request, max_bytes: int) -> None:
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise InvalidRequestError("The Content-Length header is not a number.")
    if len(length) > 18 or int(length) > max_bytes:
        raise too_large(max_bytes)


def too_large(max_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The request body is larger than {max_bytes} bytes.")


async def parse(request: Request, model: type[M], max_bytes: int) -> M:
    """Read the body and validate it as `model`, in a thread when it is large."""
    body = await read(request, max_bytes)
    if len(body) <= _ON_LOOP_BYTES:
        return validate(model, decode(body))
    return await asyncio.to_thread(lambda: validate(model, decode(body)))


def decode(body: bytes) -> dict[str, Any]:
    """JSON object -> dict, without keys that are null: null means unset at the top level."""
    try:
        data = msgspec.json.decode(body)
    except RecursionError:
        raise InvalidRequestError("The request body is nested too deeply.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise InvalidRequestError(f"The request body is not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("The request body must be a JSON object.")
    return {key: value for key, value in data.items() if value is not None}
