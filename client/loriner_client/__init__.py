"""A client of a Loriner server, over gRPC or HTTP.

from loriner_client import Client

with Client("127.0.0.1:8001") as client:
    with client.stream_chat("Why is the sky blue?", adapter="pirate") as stream:
        for delta in stream:
            print(delta.text, end="")
"""

from loriner_client._async_client import AsyncClient
from loriner_client._client import Client
from loriner_client._config import Retry, Tls
from loriner_client._errors import (
    AdapterConflictError,
    AdapterError,
    AdapterNotFoundError,
    AdapterQuarantinedError,
    AdapterStoreError,
    AdapterTooLargeError,
    AuthenticationError,
    ConfigError,
    ConnectError,
    ContextLengthError,
    DeadlineExceededError,
    EngineError,
    EngineFailedError,
    EngineUnavailableError,
    InvalidAdapterError,
    InvalidRequestError,
    KeyNotFoundError,
    LorinerError,
    ModelNotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    QuotaExceededError,
    ServerError,
    TransportError,
)
from loriner_client._models import (
    Adapter,
    AdapterDetail,
    Chat,
    Completion,
    Delta,
    Generate,
    Message,
    Opening,
    Query,
    Sampling,
    Status,
    TokenLogprob,
    ToolCall,
    UploadReport,
    Usage,
)
from loriner_client._streams import AsyncStream, Stream
from loriner_client._transport import (
    AsyncFakeTransport,
    AsyncTransport,
    FakeTransport,
    Transport,
    completion,
)
from loriner_client._upload import Upload

__all__ = [
    "Adapter",
    "AdapterConflictError",
    "AdapterDetail",
    "AdapterError",
    "AdapterNotFoundError",
    "AdapterQuarantinedError",
    "AdapterStoreError",
    "AdapterTooLargeError",
    "AsyncClient",
    "AsyncFakeTransport",
    "AsyncStream",
    "AsyncTransport",
    "AuthenticationError",
    "Chat",
    "Client",
    "Completion",
    "ConfigError",
    "ConnectError",
    "ContextLengthError",
    "DeadlineExceededError",
    "Delta",
    "EngineError",
    "EngineFailedError",
    "EngineUnavailableError",
    "FakeTransport",
    "Generate",
    "InvalidAdapterError",
    "InvalidRequestError",
    "KeyNotFoundError",
    "LorinerError",
    "Message",
    "ModelNotFoundError",
    "Opening",
    "OverloadedError",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "Query",
    "QuotaExceededError",
    "Retry",
    "Sampling",
    "ServerError",
    "Status",
    "Stream",
    "Tls",
    "TokenLogprob",
    "ToolCall",
    "Transport",
    "TransportError",
    "Upload",
    "UploadReport",
    "Usage",
    "completion",
]
