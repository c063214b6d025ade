"""A running server, as the command line talks to it: the only file here that knows httpx.

Invariant: whatever goes wrong on the way becomes a RemoteError whose text can be shown.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from loriner.adapters.intake import is_kept
from loriner.api.access import is_loopback
from loriner.config import KEY_ENV
from loriner.errors import ConfigError, LorinerError

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT = httpx.Timeout(10.0, read=600.0, write=600.0)


class RemoteError(LorinerError):
    """The server refused, with a `code` of the API's errors, or did not answer (""); `reasons` are
    those of a refused adapter."""

    def __init__(self, message: str, reasons: Sequence[str] = (), code: str = "") -> None:
        super().__init__(message)
        self.reasons, self.code = tuple(reasons), code


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--url` and `--key`."""
    parser.add_argument(
        "--url",
        default=os.environ.get("LORINER_URL", DEFAULT_URL),
        help=f"the server (default: {DEFAULT_URL}, env: LORINER_URL)",
    )
    parser.add_argument(
        "--key",
        default=default_key(),
        help="API key (env: LORINER_ADMIN_KEY or LORINER_API_KEY)",
    )


def default_key() -> str:
    """The key in the environment, the admin's first."""
    return next(filter(None, map(os.environ.get, KEY_ENV)), "")


class Remote:
    """One server, for any number of threads. Close it, or use it in a `with` block.

    Each thread has a client: in a shared one a request waits for a connection of its own, gives up
    after `TIMEOUT`, and takes the pool with it.
    """

    def __init__(self, url: str, key: str = "", transport: httpx.BaseTransport | None = None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not an http:// or https:// address.")
        trust_env = not is_loopback(parts.hostname)
        self._make = partial(
            httpx.Client,
            base_url=url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=TIMEOUT,
            trust_env=trust_env,
            transport=transport,
            verify=httpx.create_ssl_context(trust_env=trust_env),
        )
        self._url = url
        self._own = threading.local()
        self._clients: list[httpx.Client] = []

    @property
    def _client(self) -> httpx.Client:
        """This thread's."""
        client: httpx.Client | None = getattr(self._own, "client", None)
        if client is None:
            client = self._own.client = self._make()
            self._clients.append(client)
        return client

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for client in self._clients:
            client.close()

    def call(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """The JSON answer of one request."""
        with self._reported():
            response = self._client.request(method, path, **request)
            answer = _json(response)
            _raise_refusal(response.status_code, answer)
            return answer

    def chat(self, body: dict[str, Any]) -> Iterator[str]:
        """The pieces of text of one streamed answer."""
        with (
            self._reported(),
            self._client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if response.status_code != 200:
                response.read()
                _raise_refusal(response.status_code, _json(response))
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if line.startswith("data: ") and data != "[DONE]":
                    yield _piece(json.loads(data))

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            raise RemoteError(
                f"no server answers at {self._url}: is `loriner serve` running?"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise RemoteError(f"{self._url}: {error}") from None


def upload_parts(
    path: Path, stack: contextlib.ExitStack, progress: Callable[[int], object] | None = None
) -> dict[str, tuple[str, io.FileIO]]:
    """The multipart files for an adapter folder or archive, opened on `stack`, read as they are
    sent; `progress` gets the size of each piece. Raises ConfigError when there is nothing to send.
    """
    if path.is_dir():
        sources = {file.name: file for file in sorted(path.iterdir()) if is_kept(file.name)}
    elif path.is_file():
        sources = {"archive": path}
    else:
        raise ConfigError(f"{path} is neither a folder nor an archive.")
    if path.is_dir() and "adapter_config.json" not in sources:
        raise ConfigError(f"{path} has no adapter_config.json: it is not an adapter folder.")
    return {
        name: (file.name, stack.enter_context(_Counted(file, progress or (lambda size: None))))
        for name, file in sources.items()
    }


class _Counted(io.FileIO):
    def __init__(self, path: Path, progress: Callable[[int], object]) -> None:
        super().__init__(path)
        self._progress = progress

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self._progress(len(data))
        return data


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise RemoteError(f"{response.url} answered {response.status_code} and no JSON object.")
    return answer


def _raise_refusal(status: int, answer: dict[str, Any]) -> None:
    if status < 400:
        return
    error = answer.get("error")
    error = error if isinstance(error, dict) else {}
    message = f"{error.get('message') or 'refused'} (status {status})"
    raise RemoteError(message, error.get("reasons", ()), str(error.get("code") or ""))


def _piece(chunk: dict[str, Any]) -> str:
    _raise_refusal(500 if "error" in chunk else 200, chunk)
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
