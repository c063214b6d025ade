"""Pieces of what a choice says -> OpenAI's deltas and its whole message.

Invariant: the deltas of a choice add up to its message.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from loriner.api import shapes
from loriner.api.tool_reader import Arguments, Call, Content, Piece


def delta_of(pieces: Sequence[Piece]) -> shapes.Delta:
    """What one event's pieces add."""
    return shapes.Delta(content=_content(pieces) or UNSET, tool_calls=_streamed(pieces) or UNSET)


def message_of(pieces: Sequence[Piece]) -> shapes.Message:
    """The message of a choice that is not streamed."""
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
    return shapes.Message(
        content=content if content or not calls else None, tool_calls=calls or UNSET
    )


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
