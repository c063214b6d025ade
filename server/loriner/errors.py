"""Every error Loriner raises on purpose. The root is `LorinerError`; nothing here knows HTTP or
gRPC (`api/status.py` holds that table, one row for each leaf).

    LorinerError
    ├── ConfigError                 a flag, environment variable or TOML key is wrong
    ├── CheckpointError             a base model folder cannot be read, written or trusted
    ├── InvalidRequestError         the caller's request breaks a stated limit; names the field
    │   └── ContextLengthError      prompt (+ max_tokens) does not fit the context
    ├── AuthenticationError         no key or an unknown key
    ├── PermissionDeniedError       the key lacks the right
    ├── KeyNotFoundError            no API key has this id
    ├── ModelNotFoundError          `model` names neither the base nor an adapter
    ├── AdapterError
    │   ├── AdapterNotFoundError    unknown, deleted, or another tenant's
    │   ├── InvalidAdapterError     an upload was refused; carries every reason
    │   ├── AdapterConflictError    `expected_generation` does not hold
    │   ├── AdapterQuarantinedError its files on disk no longer match its digest
    │   ├── AdapterTooLargeError    no seat could ever hold it
    │   └── AdapterStoreError       the store cannot read or write its disk; nothing was changed
    ├── PayloadTooLargeError        an upload passes the byte limit
    ├── OverloadedError             the queue is full; retry later
    ├── QuotaExceededError          the tenant has what it may have
    ├── DataError                   training data cannot be read or has too many bad rows
    ├── ObjectNotFoundError         no such training file or job
    ├── TrainError                  a training run cannot go on, or its result is not published
    └── EngineError
        ├── EngineUnavailableError  the engine is down, starting or draining
        └── EngineFailedError       this request was lost to a fault in the engine
"""

from __future__ import annotations

from collections.abc import Sequence


class LorinerError(Exception):
    """Base of all Loriner errors; `str(error)` is safe to show to the caller."""


class ConfigError(LorinerError):
    """A setting is wrong; the message names it and the allowed range."""


class CheckpointError(LorinerError):
    """A base model folder is missing something, malformed, or of an unsupported family."""


class InvalidRequestError(LorinerError):
    """The request breaks a stated limit. `param` is the field as the caller wrote it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """Prompt and requested tokens do not fit in the model's context."""


class AuthenticationError(LorinerError):
    """No API key was given, or it is unknown or revoked."""


class PermissionDeniedError(LorinerError):
    """The key is known and lacks the scope for this operation."""


class KeyNotFoundError(LorinerError):
    """No API key has this id."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"There is no API key with the id `{key_id}`.")
        self.param = "id"


class ModelNotFoundError(LorinerError):
    """`model` names neither the base nor an adapter that this caller may use."""

    def __init__(self, name: str, param: str | None = "model") -> None:
        super().__init__(f"The model `{name}` does not exist or you do not have access to it.")
        self.name = name
        self.param = param


class AdapterError(LorinerError):
    """Base of everything that is about one adapter."""


class AdapterNotFoundError(AdapterError):
    """No such adapter for this caller. A foreign adapter looks exactly the same."""

    def __init__(self, name: str, param: str | None = "adapter") -> None:
        super().__init__(f"The adapter `{name}` does not exist or you do not have access to it.")
        self.name = name
        self.param = param


class InvalidAdapterError(AdapterError):
    """An upload was refused. `reasons` lists everything that is wrong, not just the first."""

    def __init__(self, reasons: Sequence[str], param: str | None = None) -> None:
        assert reasons
        super().__init__("The adapter was refused: " + "; ".join(reasons))
        self.reasons = tuple(reasons)
        self.param = param


class AdapterConflictError(AdapterError):
    """The alias no longer points at `expected_generation`."""


class AdapterQuarantinedError(AdapterError):
    """The adapter's files no longer match its digest; it was moved aside and is not served."""


class AdapterTooLargeError(AdapterError):
    """The adapter needs more memory than the whole pool has."""


class AdapterStoreError(AdapterError):
    """The adapter store's disk is full, read-only or failing; the operation left nothing behind."""


class PayloadTooLargeError(LorinerError):
    """An upload passes the configured byte limit."""


class OverloadedError(LorinerError):
    """The queue is full. `retry_after_s` is a hint in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaExceededError(LorinerError):
    """The tenant has what it may have. `retry_after_s` is None where waiting does not help."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DataError(LorinerError):
    """Training data is unreadable or bad; the message has file, lines and reasons."""


class ObjectNotFoundError(LorinerError):
    """No training file or job has this id."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TrainError(LorinerError):
    """A training run cannot go on, resume or be published; the message says what to do."""


class EngineError(LorinerError):
    """Base of faults on our side of the fence."""


class EngineUnavailableError(EngineError):
    """The engine is starting, restarting or draining; the request was not run."""

    def __init__(self, message: str, retry_after_s: float = 2.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineFailedError(EngineError):
    """The engine failed while it ran this request."""
