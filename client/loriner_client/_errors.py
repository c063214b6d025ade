"""Everything the client raises. Catch `LorinerError` for all of it, a leaf to recover from one.

LorinerError
├── ConfigError                 an address, key or file given to the client is wrong
├── TransportError              no answer came
│   ├── ConnectError            no server could be reached
│   └── DeadlineExceededError   `timeout_s` passed first
├── ServerError                 the server failed and says no more than the request's id
├── InvalidRequestError         breaks a stated limit; `param` names the field
│   └── ContextLengthError      prompt (+ max_tokens) does not fit the context
├── AuthenticationError         no key or an unknown key
├── PermissionDeniedError       the key lacks the right
├── ModelNotFoundError          `model` names neither the base nor an adapter
├── AdapterError
│   ├── AdapterNotFoundError    unknown, deleted, or another tenant's
│   ├── InvalidAdapterError     an upload was refused; `reasons` has every reason
│   ├── AdapterConflictError    `expected_generation` does not hold
│   ├── AdapterQuarantinedError its files on disk no longer match its digest
│   ├── AdapterTooLargeError    no seat could ever hold it
│   └── AdapterStoreError       the store's disk failed; nothing was changed
├── PayloadTooLargeError        an upload or message passes the byte limit
├── OverloadedError             the queue is full; `retry_after_s` is a hint
├── QuotaExceededError          the tenant has what it may have
├── DataError                   training data is unreadable or bad
├── ObjectNotFoundError         no training file or job has this id
└── EngineError
    ├── EngineUnavailableError  starting, restarting or draining; the request was not run
    └── EngineFailedError       this request was lost to a fault in the engine
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a server said when it refused, whichever transport carried it."""

    message: str
    code: str | None = None  # adapter_not_found, queue_full, ...
    param: str | None = None
    request_id: str | None = None
    reasons: tuple[str, ...] = ()
    retry_after_s: float | None = None


class LorinerError(Exception):
    """Base of all errors of this package."""

    def __init__(self, refusal: Refusal | str) -> None:
        refusal = Refusal(refusal) if isinstance(refusal, str) else refusal
        super().__init__(refusal.message)
        self.code = refusal.code
        self.param = refusal.param
        self.request_id = refusal.request_id
        self.reasons = refusal.reasons
        self.retry_after_s = refusal.retry_after_s


class ConfigError(LorinerError):
    """An address, key or file given to the client is wrong."""


class TransportError(LorinerError):
    """No answer came."""


class ConnectError(TransportError):
    """No server could be reached."""


class DeadlineExceededError(TransportError):
    """`timeout_s` passed before the answer was whole."""


class ServerError(LorinerError):
    """The server failed; `request_id` finds it in its log."""


class InvalidRequestError(LorinerError):
    """The request breaks a stated limit; `param` names the field."""


class ContextLengthError(InvalidRequestError):
    """Prompt and requested tokens do not fit in the model's context."""


class AuthenticationError(LorinerError):
    """No API key was given, or it is unknown or revoked."""


class PermissionDeniedError(LorinerError):
    """The key lacks the right."""


class KeyNotFoundError(LorinerError):
    """No API key has this id."""


class ModelNotFoundError(LorinerError):
    """`model` names neither the base nor an adapter that this key may use."""


class AdapterError(LorinerError):
    """Base of everything that is about one adapter."""


class AdapterNotFoundError(AdapterError):
    """No such adapter for this key."""


class InvalidAdapterError(AdapterError):
    """An upload was refused; `reasons` lists everything that is wrong."""


class AdapterConflictError(AdapterError):
    """The name does not stand for `expected_generation`."""


class AdapterQuarantinedError(AdapterError):
    """The adapter's files no longer match its digest."""


class AdapterTooLargeError(AdapterError):
    """The adapter needs more memory than the server's whole pool has."""


class AdapterStoreError(AdapterError):
    """The server's disk failed; nothing was changed."""


class PayloadTooLargeError(LorinerError):
    """An upload or message passes the server's byte limit."""


class OverloadedError(LorinerError):
    """The queue is full."""


class QuotaExceededError(LorinerError):
    """The tenant has what it may have; `retry_after_s` is None where waiting does not help."""


class DataError(LorinerError):
    """Training data is unreadable or bad; the message has lines and reasons."""


class ObjectNotFoundError(LorinerError):
    """No training file or job has this id."""


class EngineError(LorinerError):
    """Base of faults on the server's side."""


class EngineUnavailableError(EngineError):
    """The engine is starting, restarting or draining; the request was not run."""


class EngineFailedError(EngineError):
    """The engine failed while it ran this request."""


BY_CODE: dict[str, type[LorinerError]] = {
    "invalid_request": InvalidRequestError,
    "context_length_exceeded": ContextLengthError,
    "invalid_api_key": AuthenticationError,
    "permission_denied": PermissionDeniedError,
    "key_not_found": KeyNotFoundError,
    "model_not_found": ModelNotFoundError,
    "adapter_not_found": AdapterNotFoundError,
    "invalid_adapter": InvalidAdapterError,
    "adapter_conflict": AdapterConflictError,
    "adapter_quarantined": AdapterQuarantinedError,
    "adapter_too_large": AdapterTooLargeError,
    "adapter_store_failed": AdapterStoreError,
    "payload_too_large": PayloadTooLargeError,
    "queue_full": OverloadedError,
    "quota_exceeded": QuotaExceededError,
    "invalid_training_data": DataError,
    "not_found": ObjectNotFoundError,
    "engine_unavailable": EngineUnavailableError,
    "engine_failed": EngineFailedError,
}


def error_of(refusal: Refusal, otherwise: type[LorinerError] = ServerError) -> LorinerError:
    """The error for what a server said; `otherwise` when its code is not known here."""
    return BY_CODE.get(refusal.code or "", otherwise)(refusal)
