"""The gRPC transports: the only file that knows grpc.

One channel over all addresses: round robin, client-side health checks, retries, all by service
config. Invariant: every grpc error leaves here as a `LorinerError`.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from loriner_client._answers import Part, UploadReport
from loriner_client._config import Retry, Settings, Tls
from loriner_client._errors import (
    ConfigError,
    ConnectError,
    DeadlineExceededError,
    LorinerError,
    PayloadTooLargeError,
    Refusal,
    ServerError,
    TransportError,
    error_of,
)
from loriner_client._queries import Query, StreamQuery
from loriner_client._rpcs import CALLS, PACKAGE, STREAMS, UPLOAD, Rpc
from loriner_client._upload import Upload

A = TypeVar("A")
MAX_ANSWER_BYTES = 256 << 20
KEEPALIVE_MS = 60_000
_DETAILS_KEY = "grpc-status-details-bin"
_HEALTH = {"healthCheckConfig": {"serviceName": f"{PACKAGE}.InferenceService"}}
_BY_CODE = {
    grpc.StatusCode.UNAVAILABLE: ConnectError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: TransportError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: PayloadTooLargeError,  # grpc's own limit on messages
}


class GrpcTransport:
    """For `Client`. Threads may share it."""

    def __init__(self, settings: Settings) -> None:
        target, options = _target(settings), _options(settings)
        self._metadata = tuple(settings.headers.items())
        self._channel: grpc.Channel = (
            grpc.insecure_channel(target, options)
            if settings.tls is None
            else grpc.secure_channel(target, _credentials(settings.tls), options)
        )

    def call(self, query: Query[A], timeout_s: float | None) -> A:
        rpc = CALLS[type(query)]
        method = self._channel.unary_unary(rpc.path, _serialize, rpc.response.FromString)
        with _mapped():
            answer = method(rpc.message(query), timeout=timeout_s, metadata=self._metadata)
        return rpc.decode(answer)  # type: ignore[no-any-return]

    def stream(self, query: StreamQuery, timeout_s: float | None) -> Iterator[Part]:
        rpc = STREAMS[type(query)]
        method = self._channel.unary_stream(rpc.path, _serialize, rpc.response.FromString)
        with _mapped():
            call = method(rpc.message(query), timeout=timeout_s, metadata=self._metadata)
            try:
                for message in call:
                    yield rpc.decode(message)
            finally:
                call.cancel()

    def upload(self, upload: Upload, timeout_s: float | None) -> UploadReport:
        method = self._channel.stream_unary(UPLOAD.path, _serialize, UPLOAD.response.FromString)
        parts = _Parts(upload)
        try:
            with _mapped():
                answer = method(parts, timeout=timeout_s, metadata=self._metadata)
        except LorinerError as error:
            raise parts.failure or error from None
        return UPLOAD.decode(answer)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._channel.close()


class AsyncGrpcTransport:
    """For `AsyncClient`: one loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metadata = tuple(settings.headers.items())
        self._opened: aio.Channel | None = None

    @property
    def _channel(self) -> aio.Channel:
        """Opened in the loop that uses it."""
        if self._opened is None:
            settings = self._settings
            target, options = _target(settings), _options(settings)
            self._opened = (
                aio.insecure_channel(target, options)
                if settings.tls is None
                else aio.secure_channel(target, _credentials(settings.tls), options)
            )
        return self._opened

    async def call(self, query: Query[A], timeout_s: float | None) -> A:
        rpc = CALLS[type(query)]
        method: Any = self._channel.unary_unary(rpc.path, _serialize, rpc.response.FromString)
        with _mapped():
            answer = await method(rpc.message(query), timeout=timeout_s, metadata=self._metadata)
        return rpc.decode(answer)  # type: ignore[no-any-return]

    async def stream(self, query: StreamQuery, timeout_s: float | None) -> AsyncIterator[Part]:
        rpc = STREAMS[type(query)]
        method: Any = self._channel.unary_stream(rpc.path, _serialize, rpc.response.FromString)
        with _mapped():
            call = method(rpc.message(query), timeout=timeout_s, metadata=self._metadata)
            try:
                async for message in call:
                    yield rpc.decode(message)
            finally:
                call.cancel()

    async def upload(self, upload: Upload, timeout_s: float | None) -> UploadReport:
        method: Any = self._channel.stream_unary(
            UPLOAD.path, _serialize, UPLOAD.response.FromString
        )
        parts = _Parts(upload)
        try:
            with _mapped():
                answer = await method(_off_loop(parts), timeout=timeout_s, metadata=self._metadata)
        except LorinerError as error:
            raise parts.failure or error from None
        return UPLOAD.decode(answer)  # type: ignore[no-any-return]

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()


class _Parts:
    """The messages of an upload. grpc reads them on a thread of its own and hides what goes wrong
    there, so it is kept."""

    def __init__(self, upload: Upload) -> None:
        upload.files()  # what is wrong now is raised now
        self._parts = UPLOAD.encode(upload)
        self.failure: Exception | None = None

    def __iter__(self) -> _Parts:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._parts)
        except (OSError, LorinerError) as error:
            self.failure = error
            raise


async def _off_loop(parts: Iterator[Any]) -> AsyncIterator[Any]:
    """Files are read beside the loop."""
    while (part := await asyncio.to_thread(next, parts, None)) is not None:
        yield part


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _target(settings: Settings) -> str:
    """One address as grpc resolves it; several as a list of IP addresses."""
    if len(settings.addresses) == 1:
        return settings.addresses[0]
    found: dict[str, list[str]] = {}
    for address in settings.addresses:
        host, _, port = address.rpartition(":")
        try:
            family, *_, (ip, *_) = socket.getaddrinfo(host.strip("[]"), int(port))[0]
        except (OSError, ValueError):
            raise ConfigError(f"address: {address} cannot be resolved.") from None
        scheme = "ipv6" if family == socket.AF_INET6 else "ipv4"
        shown = f"[{ip}]:{port}" if scheme == "ipv6" else f"{ip}:{port}"
        found.setdefault(scheme, []).append(shown)
    if len(found) > 1:
        raise ConfigError("address: several must be all IPv4 or all IPv6.")
    ((scheme, all_shown),) = found.items()
    return f"{scheme}:{','.join(all_shown)}"


def _options(settings: Settings) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", json.dumps(_service_config(settings))),
        ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.enable_retries", int(settings.retry.attempts > 1)),
    ]
    if len(settings.addresses) > 1:
        host = settings.addresses[0].rpartition(":")[0].strip("[]")
        options.append(("grpc.default_authority", host))
    return options


def _service_config(settings: Settings) -> dict[str, Any]:
    several = len(settings.addresses) > 1
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if several:  # with one server there is nowhere else to go: its own refusal says more
        config |= _HEALTH
    if settings.retry.attempts > 1:
        rpcs = [rpc for rpc in (*CALLS.values(), *STREAMS.values()) if rpc.is_retryable]
        config["methodConfig"] = [
            {"name": [_name(rpc) for rpc in rpcs], "retryPolicy": _policy(settings.retry)}
        ]
    return config


def _name(rpc: Rpc) -> dict[str, str]:
    return {"service": f"{PACKAGE}.{rpc.service}", "method": rpc.method}


def _policy(retry: Retry) -> dict[str, Any]:
    return {
        "maxAttempts": retry.attempts,
        "initialBackoff": f"{retry.first_s}s",
        "maxBackoff": f"{retry.longest_s}s",
        "backoffMultiplier": 2,
        # CANCELLED, unless by the caller, is what a server that stops says to calls that it has not
        # begun: grpc issue 41785
        "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
    }


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    def read(path: Path | None) -> bytes | None:
        try:
            return None if path is None else path.read_bytes()
        except OSError as error:
            raise ConfigError(f"tls: {error}.") from None

    return grpc.ssl_channel_credentials(
        read(tls.authorities), read(tls.private_key), read(tls.certificate)
    )


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise _error_of(error) from error


def _error_of(error: Any) -> LorinerError:
    """From the details when there are some, else from the code."""
    trailer: Sequence[tuple[str, Any]] = tuple(error.trailing_metadata() or ())
    for key, value in trailer:
        if key == _DETAILS_KEY:
            return error_of(_refusal(status_pb2.Status.FromString(value)))
    kind = _BY_CODE.get(error.code(), ServerError)
    return kind(f"{error.details() or 'no answer'} ({error.code().name})")


def _refusal(status: Any) -> Refusal:
    info = error_details_pb2.ErrorInfo()
    bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for kind in (info, bad, retry):
            if detail.Is(kind.DESCRIPTOR):
                detail.Unpack(kind)
    code = info.reason.lower() or None
    reasons = [violation.description for violation in bad.field_violations]
    return Refusal(
        status.message,
        code,
        info.metadata.get("param"),
        info.metadata.get("request_id"),
        tuple(reasons) if code == "invalid_adapter" else (),
        retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None,
    )
