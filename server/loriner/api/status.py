"""How an error looks from outside: one row for each class of `loriner.errors`, and the HTTP answer.

Both doors read this table and nothing else decides a status. Invariant: a body with status 5xx
holds a fixed sentence and the request id, never `str(error)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec
from starlette.responses import Response

from loriner import errors

_SORRY = "The server had an error while processing your request."


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `message` replaces an error's own text that may hold internals."""

    status: int
    type: str
    code: str | None
    grpc: str
    message: str | None = None
    should_retry: bool | None = None  # None: let the client's own rule decide


_BAD = "invalid_request_error"
_OURS = "server_error"

INTERNAL = Row(500, _OURS, "internal_error", "INTERNAL", _SORRY)

TABLE: Mapping[type[errors.LorinerError], Row] = MappingProxyType(
    {
        errors.LorinerError: INTERNAL,
        errors.ConfigError: INTERNAL,
        errors.CheckpointError: INTERNAL,
        errors.InvalidRequestError: Row(400, _BAD, None, "INVALID_ARGUMENT"),
        errors.ContextLengthError: Row(400, _BAD, "context_length_exceeded", "INVALID_ARGUMENT"),
        errors.AuthenticationError: Row(401, _BAD, "invalid_api_key", "UNAUTHENTICATED"),
        errors.PermissionDeniedError: Row(403, _BAD, "permission_denied", "PERMISSION_DENIED"),
        errors.ModelNotFoundError: Row(404, _BAD, "model_not_found", "NOT_FOUND"),
        errors.AdapterError: INTERNAL,
        errors.AdapterNotFoundError: Row(404, _BAD, "adapter_not_found", "NOT_FOUND"),
        errors.InvalidAdapterError: Row(422, _BAD, "invalid_adapter", "INVALID_ARGUMENT"),
        errors.AdapterConflictError: Row(409, _BAD, "adapter_conflict", "ABORTED", None, False),
        errors.AdapterQuarantinedError: Row(
            503,
            _OURS,
            "adapter_quarantined",
            "DATA_LOSS",
            "The adapter's files no longer match its digest. It must be published again.",
            False,
        ),
        errors.AdapterTooLargeError: Row(400, _BAD, "adapter_too_large", "FAILED_PRECONDITION"),
        errors.AdapterStoreError: Row(
            503,
            _OURS,
            "adapter_store_failed",
            "UNAVAILABLE",
            "The adapter store cannot use its disk now. Nothing was changed.",
        ),
        errors.PayloadTooLargeError: Row(413, _BAD, "payload_too_large", "INVALID_ARGUMENT"),
        errors.OverloadedError: Row(429, "rate_limit_error", "queue_full", "RESOURCE_EXHAUSTED"),
        errors.EngineError: INTERNAL,
        errors.EngineUnavailableError: Row(
            503,
            _OURS,
            "engine_unavailable",
            "UNAVAILABLE",
            "The engine is not ready to run requests now. Try again soon.",
        ),
        errors.EngineFailedError: Row(
            500, _OURS, "engine_failed", "INTERNAL", "The engine failed while it ran this request."
        ),
    }
)

_HTTP_CODES: Mapping[int, str] = MappingProxyType(
    {
        404: "unknown_url",
        405: "method_not_allowed",
        408: "request_timeout",
        415: "unsupported_media_type",
    }
)


def row_of(error: BaseException) -> Row:
    """The most specific row for `error`; anything that is not ours is an internal error."""
    for cls in type(error).__mro__:
        if cls in TABLE:
            return TABLE[cls]
    return INTERNAL


def error_body(error: BaseException, request_id: str) -> dict[str, Any]:
    """OpenAI's `{"error": {message, type, param, code}}`; a refused upload adds its `reasons`."""
    row = row_of(error)
    message = str(error) if row.message is None else row.message
    if row.status >= 500:
        message = f"{message} (request id {request_id})"
    body = {
        "message": message,
        "type": row.type,
        "param": getattr(error, "param", None),
        "code": row.code,
    }
    if isinstance(error, errors.InvalidAdapterError):
        body["reasons"] = list(error.reasons)
    return {"error": body}


def error_response(error: BaseException, request_id: str) -> Response:
    row = row_of(error)
    headers: dict[str, str] = {}
    retry_after_s: float | None = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
        headers["retry-after-ms"] = str(math.ceil(retry_after_s * 1000))
    if row.should_retry is not None:
        headers["x-should-retry"] = str(row.should_retry).lower()
    if row.status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(error_body(error, request_id), row.status, headers)


def http_error_response(status: int, message: str, headers: Mapping[str, str] | None) -> Response:
    """The answer to what Starlette itself refuses: an unknown path, a wrong method."""
    code = _HTTP_CODES.get(status)
    body = {"error": {"message": message, "type": _BAD, "param": None, "code": code}}
    return json_response(body, status, headers)


def json_response(
    body: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")
