"""The four kinds of client behind one blocking face, so that a test is written once."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loriner_client import AsyncClient, Client
from tests.api.live import LiveServer

KINDS = ("grpc", "http", "async grpc", "async http")


def address_of(kind: str, live: LiveServer) -> str:
    if kind.endswith("http"):
        return live.url
    assert live.server.grpc is not None
    return live.server.grpc.address


@contextmanager
def open_client(kind: str, live: LiveServer, **settings: Any) -> Iterator[Any]:
    address = address_of(kind, live)
    if kind.startswith("async"):
        with asyncio.Runner() as runner:
            client = AsyncClient(address, **settings)
            yield Blocking(client, runner)
            runner.run(client.close())
        return
    with Client(address, **settings) as client:
        yield client


class Blocking:
    """An async object, each coroutine run to its end; streams and iterators as blocking ones."""

    def __init__(self, inner: Any, runner: asyncio.Runner) -> None:
        self._inner, self._runner = inner, runner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return Blocking(found, self._runner) if name == "adapters" else found
        return lambda *args, **more: self._finish(found(*args, **more))

    def __enter__(self) -> Any:
        self._runner.run(_enter(self._inner))
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._runner.run(_exit(self._inner, exc_info))

    def __iter__(self) -> Iterator[Any]:
        iterator = aiter(self._inner)
        while True:
            try:
                yield self._runner.run(_next(iterator))
            except StopAsyncIteration:
                return

    def _finish(self, made: Any) -> Any:
        if inspect.iscoroutine(made):
            return self._runner.run(made)
        return Blocking(made, self._runner)


async def _enter(inner: Any) -> Any:
    return await inner.__aenter__()


async def _exit(inner: Any, exc_info: Any) -> Any:
    return await inner.__aexit__(*exc_info)


async def _next(iterator: Any) -> Any:
    return await anext(iterator)
