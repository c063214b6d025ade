"""HTTP answers: plain JSON, and errors with OpenAI's body and the headers that clients retry by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import msgspec
from starlette.responses import Response

from loriner.api.status import BAD, error_body, row_of
from loriner.errors import QuotaExceededError

_HTTP_CODES: Mapping[int, str] = MappingProxyType(
    {
        404: "unknown_url",
        405: "method_not_allowed",
        408: "request_timeout",
        415: "unsupported_media_type",
    }
)


def error_response(error: BaseException, request_id: str) -> Response:
    row = row_of(error)
    headers: dict[str, str] = {}
    retry_after_s: float | None = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
        headers["retry-after-ms"] = str(math.ceil(retry_after_s * 1000))
    should_retry = row.should_retry
    if isinstance(error, QuotaExceededError) and retry_after_s is None:
        should_retry = False  # of what is stored: waiting does not help
    if should_retry is not None:
        headers["x-should-retry"] = str(should_retry).lower()
    if row.status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(error_body(error, request_id), row.status, headers)


def http_error_response(status: int, message: str, headers: Mapping[str, str] | None) -> Response:
    """The answer to what Starlette itself refuses: an unknown path, a wrong method."""
    code = _HTTP_CODES.get(status)
    body = {"error": {"message": message, "type": BAD, "param": None, "code": code}}
    return json_response(body, status, headers)


def json_response(
    body: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")
