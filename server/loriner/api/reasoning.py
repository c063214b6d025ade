"""Reasoning that a base writes before its answer: found by the marks in its chat template, read off
its text, allowed for in grammars, asked for by `reasoning_effort`.

Pure. Off where the template has no marks. Invariant: the pieces of a text are the same however it
was cut, and no mark is in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from loriner.api.pieces import Content, Piece, Reasoning
from loriner.errors import InvalidRequestError

MAX_TAIL = 16  # tokens of a prompt in which its last mark is looked for
_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_SWITCH, _LEVEL = "enable_thinking", "reasoning_effort"  # what templates read


@dataclass(frozen=True, slots=True)
class Thinking:
    """How one answer's reasoning stands in its text."""

    opening: str
    closing: str
    is_open: bool  # the prompt ends inside of it: the answer begins with reasoning
    is_shown: bool = True

    def reader(self) -> ReasoningReader:
        return ReasoningReader(self)

    def grammar(self, spell: Callable[[str], str]) -> str:
        """Lark: a rule `before` of all that may stand before the answer's own grammar. `spell`: a
        mark -> a string, or the special token that it is."""
        closing = spell(self.closing)
        if closing.startswith("<"):
            end = f"thought: TEXT {closing}"
        else:
            end = f"thought[lazy]: TEXT {closing}"
        opened = "thought GAP" if self.is_open else f"(GAP {spell(self.opening)} thought GAP)?"
        return f"before: {opened}\n{end}\nTEXT: /(.|\\n)*/\nGAP: /\\n{{0,2}}/"


def thinking_of(template: str, tail: str, *, continued: str | None, shown: bool) -> Thinking | None:
    """None: the answer has no reasoning of its own. `tail` is where the prompt ends; `continued`
    the message that the answer goes on with, if it does."""
    for opening, closing in _MARKS:
        if closing not in template:
            continue
        if continued is not None and continued.strip():
            is_open = continued.rfind(opening) > continued.rfind(closing)
            return Thinking(opening, closing, True, shown) if is_open else None
        if tail.rstrip().endswith(closing):
            return None
        return Thinking(opening, closing, tail.rstrip().endswith(opening), shown)
    return None


def effort_kwargs(template: str, effort: str | None) -> dict[str, bool | str]:
    """What the template is told of `reasoning_effort`. Raises InvalidRequestError for what it
    cannot keep."""
    if effort is None:
        return {}
    if effort == "none":
        if re.search(rf"\b{_SWITCH}\b", template):
            return {_SWITCH: False}
        if not any(closing in template for _, closing in _MARKS):
            return {}
        why = "its chat template always thinks"
    elif re.search(rf"\b{_LEVEL}\b", template):
        return {_LEVEL: effort}
    else:
        why = "its chat template knows no levels"
    raise InvalidRequestError(
        f"This value of 'reasoning_effort' is not served on this base: {why}.", "reasoning_effort"
    )


class ReasoningReader:
    """Reads one choice. `has_thought`: there is reasoning; `is_over`: all that follows is not."""

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._held = ""
        self._read = self._thought if thinking.is_open else self._begin
        self._has_said = False
        self.has_thought = thinking.is_open
        self.is_over = False

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._read(pieces, False):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back."""
        pieces: list[Piece] = []
        while self._read(pieces, True):
            pass
        return pieces

    def _begin(self, pieces: list[Piece], is_last: bool) -> bool:
        """At the start of a text that may open with reasoning; whether to read on."""
        text, opening = self._held.lstrip(), self._thinking.opening
        if text.startswith(opening):
            self._held, self._read, self.has_thought = text[len(opening) :], self._thought, True
            return True
        if opening.startswith(text) and not is_last:
            return False
        self._read, self.is_over = self._answer, True
        return True

    def _thought(self, pieces: list[Piece], is_last: bool) -> bool:
        closing = self._thinking.closing
        if not self._has_said:
            self._held = self._held.lstrip()
        thought, found, after = self._held.partition(closing)
        if found:
            self._think(pieces, thought.rstrip())
            self._held, self._read = after, self._after
            return True
        size = len(thought)
        if not is_last:
            size = len(thought[: size - overlap(thought, closing)])
        size = len(thought[:size].rstrip())
        self._think(pieces, thought[:size])
        self._held = "" if is_last else thought[size:]
        return False

    def _after(self, pieces: list[Piece], is_last: bool) -> bool:
        """Lines without text between reasoning and answer are of neither."""
        self._held = self._held.lstrip("\n")
        self.is_over = True
        if self._held:
            self._read = self._answer
        return bool(self._held)

    def _answer(self, pieces: list[Piece], is_last: bool) -> bool:
        if self._held:
            pieces.append(Content(self._held))
            self._held = ""
        return False

    def _think(self, pieces: list[Piece], text: str) -> None:
        if text:
            self._has_said = True
            pieces.append(Reasoning(text))


def overlap(text: str, mark: str) -> int:
    """Length of the longest tail of `text` that begins `mark`."""
    sizes = range(min(len(text), len(mark) - 1), 0, -1)
    return next((size for size in sizes if mark.startswith(text[-size:])), 0)
