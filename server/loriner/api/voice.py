"""What a choice says, event by event: text -> content and calls, read once for all doors.

Pure. Invariant: the pieces of all events of a choice are the same however its text was cut, and the
last one has its finish_reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loriner.api.tool_calling import ToolCalling
from loriner.api.tool_reader import Call, Content, Piece
from loriner.core import Event


@dataclass(frozen=True, slots=True)
class Said:
    """What one event adds to one choice."""

    index: int
    event: Event
    pieces: Sequence[Piece]
    finish_reason: str | None  # with the last: OpenAI's


class Voice:
    """One choice."""

    def __init__(self, index: int, calling: ToolCalling | None) -> None:
        self._index, self._calling = index, calling
        self._reader = None if calling is None else calling.reader()
        self._num_calls = 0

    def hear(self, event: Event) -> Said:
        finish = None if event.finish_reason is None else event.finish_reason.value
        pieces = self._read(event.text, finish is not None)
        self._num_calls += sum(isinstance(piece, Call) for piece in pieces)
        if finish is not None and self._calling is not None:
            finish = self._calling.finish_reason(finish, self._num_calls)
        return Said(self._index, event, pieces, finish)

    def _read(self, text: str, is_last: bool) -> list[Piece]:
        if self._reader is None:
            return [Content(text)] if text else []
        pieces = self._reader.feed(text)
        return [*pieces, *self._reader.finish()] if is_last else pieces
