"""The requests under way, as the doors' side knows them: the room they take, and their events' way.

Knows no engine and no adapters. Invariant: a request's room is taken from before its generation is
held until its stream is closed, and never more than `max_sequences` are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loriner.core import Event, FinishReason
from loriner.engine.generation import Generation
from loriner.errors import InvalidRequestError, OverloadedError


class Admitted:
    """Open generations by request id; its length is how many there are."""

    def __init__(self, max_sequences: int) -> None:
        self._max_sequences = max_sequences
        self._open: dict[str, Generation] = {}
        self._num_sequences = 0

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def room(self, request_id: str, num_sequences: int) -> Iterator[None]:
        """Take room for a request, to be given back by `remove`, or at once when the block fails.
        Raises InvalidRequestError, OverloadedError."""
        if request_id in self._open:
            raise InvalidRequestError("request_id is in use.", "request_id")
        limit = self._max_sequences
        if num_sequences > limit:
            raise InvalidRequestError(f"n: at most {limit} sequences can be queued.", "n")
        if self._num_sequences + num_sequences > limit:
            raise OverloadedError(f"The queue is full ({limit} sequences).")
        self._num_sequences += num_sequences
        try:
            yield
        except BaseException:
            self._num_sequences -= num_sequences
            raise

    def add(self, generation: Generation) -> None:
        """From now on it gets its events. Its room was taken."""
        self._open[generation.request_id] = generation

    def remove(self, generation: Generation) -> bool:
        """Give its room back; False when that was done before."""
        if self._open.pop(generation.request_id, None) is None:
            return False
        self._num_sequences -= generation.num_sequences
        return True

    def deliver(self, event: Event) -> None:
        """To its request, if that is still open."""
        generation = self._open.get(event.request_id)
        if generation is not None:
            generation.put(event)

    def fail(self) -> None:
        """The engine stopped: tell every choice of every request."""
        for generation in list(self._open.values()):
            for index in range(generation.num_sequences):
                generation.put(
                    Event(
                        generation.request_id,
                        index,
                        finish_reason=FinishReason.ERROR,
                        error="The engine stopped while it ran this request.",
                        error_kind="EngineFailedError",
                    )
                )
