"""Pieces of what a choice says -> OpenAI's deltas and its whole message.

Invariant: the deltas of a choice add up to its message.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from loriner.api import shapes
from loriner.api.pieces import Arguments, Call, Content, Piece, Reasoning


def delta_of(pieces: Sequence[Piece]) -> shapes.Delta:
    """What one event's pieces add."""
    thought = _text(pieces, Reasoning) or UNSET
    return shapes.Delta(
        content=_text(pieces, Content) or UNSET,
        reasoning_content=thought,
        reasoning=thought,
        tool_calls=_streamed(pieces) or UNSET,
    )


def message_of(pieces: Sequence[Piece], echoed: str = "") -> shapes.Message:
    """The message of a choice that is not streamed, after `echoed`."""
    calls = [
        shapes.ToolCall(
            id=piece.call_id,
            type="function",
            function=shapes.FunctionCall(name=piece.name, arguments=_arguments(pieces, piece)),
        )
        for piece in pieces
        if isinstance(piece, Call)
    ]
    content, thought = echoed + _text(pieces, Content), _text(pieces, Reasoning) or UNSET
    return shapes.Message(
        content=content if content or not (calls or thought) else None,
        reasoning_content=thought,
        reasoning=thought,
        tool_calls=calls or UNSET,
    )


def _text(pieces: Sequence[Piece], kind: type[Content] | type[Reasoning]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, kind))


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
