"""One admitted request as its door reads it: events are put in, and closing is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType

from loriner import errors
from loriner.adapters.mixture import Served, generations
from loriner.core import Event, FinishReason, Request


class Generation:
    """One admitted request: an async iterator of events that frees everything when closed."""

    def __init__(
        self,
        request: Request,
        record: Served | None,
        on_close: Callable[[Generation], None],
    ) -> None:
        self.request_id = request.request_id
        self.record = record
        self.num_prompt_tokens = len(request.prompt_ids)
        self.num_sequences = request.sampling.n
        self._on_close, self._num_open = on_close, request.sampling.n
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._closed = False

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Event:
        if self._num_open == 0:
            await self.close()
            raise StopAsyncIteration
        event = await self._events.get()
        self._num_open -= event.finish_reason is not None
        if event.finish_reason is FinishReason.ERROR:
            await self.close()
            raise _error_of(event)
        return event

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def held(self) -> tuple[str, ...]:
        """The generations that are held for it."""
        return generations(self.record)

    @property
    def finished(self) -> bool:
        """Whether every choice's last event has been read."""
        return self._num_open == 0

    def put(self, event: Event) -> None:
        self._events.put_nowait(event)

    async def close(self) -> None:
        """Abort what still runs and release the generation. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._on_close(self)


def _error_of(event: Event) -> errors.LorinerError:
    """The engine's error, as the class it was there."""
    message = event.error or "The engine failed."
    kind = getattr(errors, event.error_kind or "", errors.EngineFailedError)
    with contextlib.suppress(TypeError):
        made = kind(message)
        if isinstance(made, errors.LorinerError) and str(made) == message:
            return made
    return errors.EngineFailedError(message)
