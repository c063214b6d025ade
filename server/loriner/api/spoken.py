"""What a choice with tools says: text and calls -> OpenAI's deltas and its whole message.

Invariant: the deltas of a text add up to its message.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from loriner.api import shapes
from loriner.api.tool_calling import ToolCalling
from loriner.api.tool_reader import Arguments, Call, Content, Piece


class Spoken:
    """One streamed choice."""

    def __init__(self, calling: ToolCalling) -> None:
        self._calling, self._reader = calling, calling.reader()
        self._num_calls = 0
        self.finish_reason: str | None = None

    def delta(self, text: str, finish: str | None) -> shapes.Delta:
        """What `text` adds; `finish` comes with the last."""
        pieces = self._reader.feed(text)
        if finish is not None:
            pieces += self._reader.finish()
        self._num_calls += sum(isinstance(piece, Call) for piece in pieces)
        if finish is not None:
            self.finish_reason = self._calling.finish_reason(finish, self._num_calls)
        content = _content(pieces)
        return shapes.Delta(content=content or UNSET, tool_calls=_streamed(pieces) or UNSET)


def whole_message(calling: ToolCalling, text: str, finish: str) -> tuple[shapes.Message, str]:
    """The message of a choice that is not streamed, and its finish_reason."""
    reader = calling.reader()
    pieces = [*reader.feed(text), *reader.finish()]
    calls = [
        shapes.ToolCall(
            id=piece.call_id,
            type="function",
            function=shapes.FunctionCall(name=piece.name, arguments=_arguments(pieces, piece)),
        )
        for piece in pieces
        if isinstance(piece, Call)
    ]
    content = _content(pieces)
    message = shapes.Message(
        content=content if content or not calls else None, tool_calls=calls or UNSET
    )
    return message, calling.finish_reason(finish, len(calls))


def _content(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Content))


def _arguments(pieces: Sequence[Piece], call: Call) -> str:
    return "".join(
        piece.text for piece in pieces if isinstance(piece, Arguments) and piece.index == call.index
    )


def _streamed(pieces: Sequence[Piece]) -> list[shapes.ToolCall]:
    """One entry for each call that these pieces are about."""
    found: dict[int, shapes.ToolCall] = {}
    for piece in pieces:
        if isinstance(piece, Call):
            found[piece.index] = shapes.ToolCall(
                index=piece.index,
                id=piece.call_id,
                type="function",
                function=shapes.FunctionCall(name=piece.name, arguments=""),
            )
        elif isinstance(piece, Arguments):
            empty = shapes.ToolCall(index=piece.index, function=shapes.FunctionCall(arguments=""))
            found.setdefault(piece.index, empty).function.arguments += piece.text
    return list(found.values())
