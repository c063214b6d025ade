"""Answers that arrive piece by piece, as context managers: leaving the block ends the request."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator
from dataclasses import replace
from types import TracebackType

from loriner_client._answers import Completion, Delta, Opening, Part, TokenLogprob, ToolCall, Usage
from loriner_client._errors import TransportError

_NO_START = "The answer did not begin with its opening."


class Stream:
    """`with client.stream_chat(...) as stream: for delta in stream: ...`

    A refusal is raised at `with`. `opening` is there from then on, `usage` after the last delta.
    """

    opening: Opening

    def __init__(self, parts: Iterator[Part]) -> None:
        self._parts = parts
        self.usage: Usage | None = None

    def __enter__(self) -> Stream:
        first = next(self._parts, None)
        if not isinstance(first, Opening):
            self.close()
            raise TransportError(_NO_START)
        self.opening = first
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Delta]:
        for part in self._parts:
            if isinstance(part, Delta):
                yield part
            elif isinstance(part, Usage):
                self.usage = part

    def completion(self) -> Completion:
        """What is still to come, in one piece."""
        return _whole(self.opening, list(self), self.usage)

    def close(self) -> None:
        """End the request, on the server too. Safe to call twice."""
        if isinstance(self._parts, Generator):
            self._parts.close()


class AsyncStream:
    """`async with client.stream_chat(...) as stream: async for delta in stream: ...`"""

    opening: Opening

    def __init__(self, parts: AsyncIterator[Part]) -> None:
        self._parts = parts
        self.usage: Usage | None = None

    async def __aenter__(self) -> AsyncStream:
        first = await anext(self._parts, None)
        if not isinstance(first, Opening):
            await self.close()
            raise TransportError(_NO_START)
        self.opening = first
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for part in self._parts:
            if isinstance(part, Delta):
                yield part
            elif isinstance(part, Usage):
                self.usage = part

    async def completion(self) -> Completion:
        """What is still to come, in one piece."""
        return _whole(self.opening, [delta async for delta in self], self.usage)

    async def close(self) -> None:
        """End the request, on the server too. Safe to call twice."""
        if isinstance(self._parts, AsyncGenerator):
            await self._parts.aclose()


def _whole(opening: Opening, deltas: Iterable[Delta], usage: Usage | None) -> Completion:
    if usage is None:
        raise TransportError("The answer ended before its usage.")
    by_index: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    choices = [_joined(by_index[index]) for index in sorted(by_index)]
    return Completion(opening, tuple(choices), usage)


def _joined(deltas: list[Delta]) -> Delta:
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        for call in delta.tool_calls:
            begun = calls.get(call.index)
            calls[call.index] = call if begun is None else _longer(begun, call)
        token_ids += delta.token_ids
        logprobs += delta.logprobs
    last = deltas[-1]
    return Delta(
        "".join(delta.text for delta in deltas),
        last.index,
        tuple(token_ids),
        tuple(logprobs),
        last.finish_reason,
        last.stop_reason,
        "".join(delta.reasoning for delta in deltas),
        tuple(calls.values()),
    )


def _longer(begun: ToolCall, more: ToolCall) -> ToolCall:
    return replace(begun, arguments=begun.arguments + more.arguments)
