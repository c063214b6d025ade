"""How an error looks from outside: one row for each class of `loriner.errors`.

Both doors read this table and nothing else decides a status. Invariant: a body with status 5xx
holds a fixed sentence and the request id, never `str(error)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

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


BAD = "invalid_request_error"
_OURS = "server_error"

INTERNAL = Row(500, _OURS, "internal_error", "INTERNAL", _SORRY)

TABLE: Mapping[type[errors.LorinerError], Row] = MappingProxyType(
    {
        errors.LorinerError: INTERNAL,
        errors.ConfigError: INTERNAL,
        errors.CheckpointError: INTERNAL,
        errors.InvalidRequestError: Row(400, BAD, None, "INVALID_ARGUMENT"),
        errors.ContextLengthError: Row(400, BAD, "context_length_exceeded", "INVALID_ARGUMENT"),
        errors.AuthenticationError: Row(401, BAD, "invalid_api_key", "UNAUTHENTICATED"),
        errors.PermissionDeniedError: Row(403, BAD, "permission_denied", "PERMISSION_DENIED"),
        errors.KeyNotFoundError: Row(404, BAD, "key_not_found", "NOT_FOUND"),
        errors.ModelNotFoundError: Row(404, BAD, "model_not_found", "NOT_FOUND"),
        errors.AdapterError: INTERNAL,
        errors.AdapterNotFoundError: Row(404, BAD, "adapter_not_found", "NOT_FOUND"),
        errors.InvalidAdapterError: Row(422, BAD, "invalid_adapter", "INVALID_ARGUMENT"),
        errors.AdapterConflictError: Row(409, BAD, "adapter_conflict", "ABORTED", None, False),
        errors.AdapterQuarantinedError: Row(
            503,
            _OURS,
            "adapter_quarantined",
            "DATA_LOSS",
            "The adapter's files no longer match its digest. It must be published again.",
            False,
        ),
        errors.AdapterTooLargeError: Row(400, BAD, "adapter_too_large", "FAILED_PRECONDITION"),
        errors.AdapterStoreError: Row(
            503,
            _OURS,
            "adapter_store_failed",
            "UNAVAILABLE",
            "The adapter store cannot use its disk now. Nothing was changed.",
        ),
        errors.PayloadTooLargeError: Row(413, BAD, "payload_too_large", "INVALID_ARGUMENT"),
        errors.OverloadedError: Row(429, "rate_limit_error", "queue_full", "RESOURCE_EXHAUSTED"),
        errors.QuotaExceededError: Row(
            429, "rate_limit_error", "quota_exceeded", "RESOURCE_EXHAUSTED"
        ),
        errors.DataError: Row(400, BAD, "invalid_training_data", "INVALID_ARGUMENT"),
        errors.ObjectNotFoundError: Row(404, BAD, "not_found", "NOT_FOUND"),
        errors.TrainError: INTERNAL,
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


def row_of(error: BaseException) -> Row:
    """The most specific row for `error`; anything that is not ours is an internal error."""
    for cls in type(error).__mro__:
        if cls in TABLE:
            return TABLE[cls]
    return INTERNAL


def message_of(error: BaseException, request_id: str) -> str:
    """What the caller may read of `error`."""
    row = row_of(error)
    message = str(error) if row.message is None else row.message
    return f"{message} (request id {request_id})" if row.status >= 500 else message


def error_body(error: BaseException, request_id: str) -> dict[str, Any]:
    """OpenAI's `{"error": {message, type, param, code}}`; a refused upload adds its `reasons`."""
    row = row_of(error)
    body = {
        "message": message_of(error, request_id),
        "type": row.type,
        "param": getattr(error, "param", None),
        "code": row.code,
    }
    if isinstance(error, errors.InvalidAdapterError):
        body["reasons"] = list(error.reasons)
    return {"error": body}
