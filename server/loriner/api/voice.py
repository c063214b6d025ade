"""What a choice says, event by event: text -> reasoning, content and calls, read once for every
door.

Pure. Invariant: the pieces of all events of a choice are the same however its text was cut, and the
last one has its finish_reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loriner.api.pieces import Call, Content, Piece, Reasoning
from loriner.api.reasoning import Thinking
from loriner.api.tool_calling import ToolCalling
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

    def __init__(self, index: int, thinking: Thinking | None, calling: ToolCalling | None) -> None:
        self._index, self._thinking, self._calling = index, thinking, calling
        self._thoughts = None if thinking is None else thinking.reader()
        self._calls = None if calling is None else calling.reader()
        self._num_calls = 0
        self._num_undecided = 0  # tokens that may turn out to be reasoning
        self.num_reasoning_tokens = 0  # the marks among them

    def hear(self, event: Event) -> Said:
        finish = None if event.finish_reason is None else event.finish_reason.value
        pieces = self._read(event, finish is not None)
        self._num_calls += sum(isinstance(piece, Call) for piece in pieces)
        if finish is not None and self._calling is not None:
            finish = self._calling.finish_reason(finish, self._num_calls)
        return Said(self._index, event, pieces, finish)

    def _read(self, event: Event, is_last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        for piece in self._split(event, is_last):
            if isinstance(piece, Content) and self._calls is not None:
                pieces += self._calls.feed(piece.text)
            elif not isinstance(piece, Reasoning) or (self._thinking and self._thinking.is_shown):
                pieces.append(piece)
        if is_last and self._calls is not None:
            pieces += self._calls.finish()
        return pieces

    def _split(self, event: Event, is_last: bool) -> list[Piece]:
        """Reasoning and the rest."""
        reader = self._thoughts
        if reader is None:
            return [Content(event.text)] if event.text else []
        if not reader.is_over:
            self._num_undecided += len(event.token_ids)
        pieces = reader.feed(event.text)
        if reader.has_thought:
            self.num_reasoning_tokens += self._num_undecided
            self._num_undecided = 0
        return [*pieces, *reader.finish()] if is_last else pieces
