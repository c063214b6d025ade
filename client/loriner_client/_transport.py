"""The seam between clients and the wire, and a fake to stand there in users' own tests.

A transport turns a `Query` into its answer. Invariant: whatever goes wrong comes out of it as a
`LorinerError`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from loriner_client._answers import (
    Completion,
    Delta,
    Embeddings,
    Opening,
    Part,
    UploadReport,
    Usage,
)
from loriner_client._queries import Query, StreamQuery
from loriner_client._upload import Upload

A = TypeVar("A")
Handler = Callable[[Any], Any]


class Transport(Protocol):
    """What `Client` stands on."""

    def call(self, query: Query[A], timeout_s: float | None) -> A:
        """The answer, in one piece."""

    def stream(self, query: StreamQuery, timeout_s: float | None) -> Iterator[Part]:
        """A generator; closing it ends the request on the server."""

    def upload(self, upload: Upload, timeout_s: float | None) -> UploadReport: ...

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """What `AsyncClient` stands on."""

    async def call(self, query: Query[A], timeout_s: float | None) -> A: ...

    def stream(self, query: StreamQuery, timeout_s: float | None) -> AsyncIterator[Part]: ...

    async def upload(self, upload: Upload, timeout_s: float | None) -> UploadReport: ...

    async def close(self) -> None: ...


class FakeTransport:
    """`Client(transport=FakeTransport(handler))`: `handler` gets each query (or Upload) and gives
    its answer; a text stands for a Completion that says it; an exception is raised. `queries`
    holds what came."""

    def __init__(self, handler: Handler) -> None:
        self.queries: list[Any] = []
        self.is_closed = False
        self._handler = handler

    def call(self, query: Query[A], timeout_s: float | None) -> A:
        return self._answer(query)  # type: ignore[no-any-return]

    def stream(self, query: StreamQuery, timeout_s: float | None) -> Iterator[Part]:
        answer: Completion = self._answer(query)
        yield answer.opening
        yield from answer.choices
        yield answer.usage

    def upload(self, upload: Upload, timeout_s: float | None) -> UploadReport:
        return self._answer(upload)  # type: ignore[no-any-return]

    def close(self) -> None:
        self.is_closed = True

    def _answer(self, query: Any) -> Any:
        self.queries.append(query)
        answer = self._handler(query)
        if isinstance(answer, BaseException):
            raise answer
        return completion(answer) if isinstance(answer, str) else answer


class AsyncFakeTransport:
    """The same for `AsyncClient`."""

    def __init__(self, handler: Handler) -> None:
        self._fake = FakeTransport(handler)

    @property
    def queries(self) -> list[Any]:
        return self._fake.queries

    @property
    def is_closed(self) -> bool:
        return self._fake.is_closed

    async def call(self, query: Query[A], timeout_s: float | None) -> A:
        return self._fake.call(query, timeout_s)

    async def stream(self, query: StreamQuery, timeout_s: float | None) -> AsyncIterator[Part]:
        for part in self._fake.stream(query, timeout_s):
            yield part

    async def upload(self, upload: Upload, timeout_s: float | None) -> UploadReport:
        return self._fake.upload(upload, timeout_s)

    async def close(self) -> None:
        self._fake.close()


def completion(text: str, adapter: str | None = None) -> Completion:
    """An answer for a fake to give."""
    return Completion(_opening(adapter), (Delta(text, finish_reason="stop"),), Usage(1, 1))


def embeddings(vectors: Sequence[Sequence[float]], adapter: str | None = None) -> Embeddings:
    """The same for `embed`."""
    return Embeddings(_opening(adapter), tuple(map(tuple, vectors)), Usage(len(vectors), 0))


def _opening(adapter: str | None) -> Opening:
    return Opening("fake", "fake", adapter, None, "", cold_start=False)
