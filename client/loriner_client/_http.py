"""The HTTP transports: the only file that knows httpx.

Slower to say what gRPC says, and everywhere. Invariant: every httpx error leaves here as a
`LorinerError`. A timeout is of each wait, and of a stream in all.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from loriner_client import _json
from loriner_client._answers import Part, UploadReport
from loriner_client._config import Retry, Settings
from loriner_client._errors import (
    ConfigError,
    ConnectError,
    DeadlineExceededError,
    ServerError,
    TransportError,
    error_of,
)
from loriner_client._queries import Query, StreamQuery
from loriner_client._routes import ADAPTERS, ROUTES, Ask, stream_ask
from loriner_client._upload import Upload

A = TypeVar("A")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
RETRYABLE = "loriner_retryable"  # of a request: safe to repeat
LOST = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)  # without an answer


class HttpTransport:
    """For `Client`. Threads may share it."""

    def __init__(self, settings: Settings) -> None:
        retry, verify = settings.retry, _verify(settings)
        wire = httpx.HTTPTransport(verify=verify, retries=retry.attempts - 1)
        self._client = httpx.Client(transport=_Patient(wire, retry), **_options(settings))

    def call(self, query: Query[A], timeout_s: float | None) -> A:
        ask, decode = ROUTES[type(query)]
        asked = ask(query)
        with _mapped():
            response = self._client.request(**_sent(asked, timeout_s))
        return _json.decoded(decode, _body(response))  # type: ignore[no-any-return]

    def stream(self, query: StreamQuery, timeout_s: float | None) -> Iterator[Part]:
        asked = stream_ask(query)
        with (
            _mapped(),
            self._client.stream(**_sent(asked, timeout_s)) as response,
        ):
            if response.status_code != 200:
                response.read()
                _body(response)
            reader, deadline = _json.Reader(), _Deadline(timeout_s)
            for line in response.iter_lines():
                deadline.check()
                yield from reader.feed(line)
            reader.finish()

    def upload(self, upload: Upload, timeout_s: float | None) -> UploadReport:
        with contextlib.ExitStack() as stack, _mapped():
            data, files = _multipart(upload, stack)
            response = self._client.post(ADAPTERS, data=data, files=files, timeout=timeout_s)
        return _json.decoded(_json.report, _body(response))  # type: ignore[no-any-return]

    def close(self) -> None:
        self._client.close()


class AsyncHttpTransport:
    """For `AsyncClient`: one loop."""

    def __init__(self, settings: Settings) -> None:
        retry, verify = settings.retry, _verify(settings)
        wire = httpx.AsyncHTTPTransport(verify=verify, retries=retry.attempts - 1)
        self._client = httpx.AsyncClient(transport=_AsyncPatient(wire, retry), **_options(settings))

    async def call(self, query: Query[A], timeout_s: float | None) -> A:
        ask, decode = ROUTES[type(query)]
        asked = ask(query)
        with _mapped():
            response = await self._client.request(**_sent(asked, timeout_s))
        return _json.decoded(decode, _body(response))  # type: ignore[no-any-return]

    async def stream(self, query: StreamQuery, timeout_s: float | None) -> AsyncIterator[Part]:
        asked = stream_ask(query)
        with _mapped():
            async with self._client.stream(**_sent(asked, timeout_s)) as response:
                if response.status_code != 200:
                    await response.aread()
                    _body(response)
                reader, deadline = _json.Reader(), _Deadline(timeout_s)
                async for line in response.aiter_lines():
                    deadline.check()
                    for part in reader.feed(line):
                        yield part
                reader.finish()

    async def upload(self, upload: Upload, timeout_s: float | None) -> UploadReport:
        with contextlib.ExitStack() as stack, _mapped():
            data, files = _multipart(upload, stack)
            response = await self._client.post(ADAPTERS, data=data, files=files, timeout=timeout_s)
        return _json.decoded(_json.report, _body(response))  # type: ignore[no-any-return]

    async def close(self) -> None:
        await self._client.aclose()


class _Patient(httpx.BaseTransport):
    """Asks again, before any of the answer was read, when the server did not begin (503), or closed
    the connection as a stopping one does."""

    def __init__(self, wire: httpx.BaseTransport, retry: Retry) -> None:
        self._wire, self._retry = wire, retry

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        for pause_s in _pauses(self._retry, request):
            try:
                response = self._wire.handle_request(request)
            except LOST:
                pass
            else:
                if not _has_not_begun(response):
                    return response
                response.close()
            time.sleep(pause_s)
        return self._wire.handle_request(request)

    def close(self) -> None:
        self._wire.close()


class _AsyncPatient(httpx.AsyncBaseTransport):
    def __init__(self, wire: httpx.AsyncBaseTransport, retry: Retry) -> None:
        self._wire, self._retry = wire, retry

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        for pause_s in _pauses(self._retry, request):
            try:
                response = await self._wire.handle_async_request(request)
            except LOST:
                pass
            else:
                if not _has_not_begun(response):
                    return response
                await response.aclose()
            await asyncio.sleep(pause_s)
        return await self._wire.handle_async_request(request)

    async def aclose(self) -> None:
        await self._wire.aclose()


def _pauses(retry: Retry, request: httpx.Request) -> Iterable[float]:
    """Before each time that a request is asked again: none if that is not safe."""
    return retry.pauses() if request.extensions.get(RETRYABLE) else ()


def _has_not_begun(response: httpx.Response) -> bool:
    return response.status_code == 503 and response.headers.get("x-should-retry") != "false"


class _Deadline:
    def __init__(self, timeout_s: float | None) -> None:
        self._ends = None if timeout_s is None else time.monotonic() + timeout_s

    def check(self) -> None:
        if self._ends is not None and time.monotonic() > self._ends:
            raise DeadlineExceededError("The answer was not whole in time.")


class _Counted(io.FileIO):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, on_read: Callable[[int], object]) -> None:
        super().__init__(path)
        self._on_read = on_read

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self._on_read(len(data))
        return data


def _multipart(
    upload: Upload, stack: contextlib.ExitStack
) -> tuple[dict[str, str], dict[str, tuple[str, io.FileIO]]]:
    """Fields and files, opened on `stack`, read as they are sent."""
    found = upload.files()
    sent, total = 0, sum(path.stat().st_size for path in found.values())

    def add(size: int) -> None:
        nonlocal sent
        sent += size
        if size:
            upload.progress(sent, total)

    data = {"name": upload.name}
    if upload.expected_generation is not None:
        data["expected_generation"] = upload.expected_generation
    opened = {name: stack.enter_context(_Counted(path, add)) for name, path in found.items()}
    return data, {name: (found[name].name, file) for name, file in opened.items()}


def _sent(asked: Ask, timeout_s: float | None) -> dict[str, Any]:
    """The arguments of httpx's `request` and `stream`."""
    json_type = {} if asked.body is None else {"content-type": "application/json"}
    return {
        "method": asked.method,
        "url": asked.path,
        "content": _json.encoded(asked.body),
        "headers": {**(asked.headers or {}), **json_type},
        "timeout": timeout_s,
        "extensions": {RETRYABLE: asked.is_retryable},
    }


def _options(settings: Settings) -> dict[str, Any]:
    (url,) = settings.addresses
    host = urlsplit(url).hostname
    if not host:
        raise ConfigError(f"address: {url!r} names no host.")
    return {
        "base_url": url,
        "headers": settings.headers,
        "trust_env": host not in LOOPBACK,
    }


def _verify(settings: Settings) -> ssl.SSLContext | bool:
    tls = settings.tls
    if tls is None:
        return True
    try:
        context = ssl.create_default_context(cafile=tls.authorities)
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.private_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls: {error}.") from None
    return context


def _body(response: httpx.Response) -> Any:
    """The JSON of an answer. Raises what a refusal says."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.status_code < 400:
        return body
    refused = _json.refusal(body, response.headers)
    if refused is None:
        raise ServerError(f"{response.url} answered {response.status_code}.")
    raise error_of(refused)


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except httpx.ConnectError as error:
        raise ConnectError(f"no server answers: {error}") from error
    except httpx.TimeoutException as error:
        raise DeadlineExceededError("The answer did not come in time.") from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise TransportError(str(error) or repr(error)) from error
