"""Tokens -> text, incrementally: never half a character, never a piece of a stop string.

Text is given out when decoding the newest tokens together with those before them ends in a whole
character. On top of it, text that might be the beginning of a stop string is held back until it is
known not to be.
"""

from __future__ import annotations

from functools import partial

from tokenizers import Tokenizer

MAX_PENDING = 16  # tokens without text: no character takes more, so what is there is given out


class Detokenizer:
    """The text of one sequence."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        include_stop: bool,
        alone: dict[int, str] | None = None,
        *,
        skip_special: bool = True,
    ) -> None:
        """`alone`: texts of single tokens, to be shared by all sequences of a tokenizer that skip
        alike."""
        self._decode = partial(tokenizer.decode, skip_special_tokens=skip_special)
        self._stop, self._include_stop = stop, include_stop
        self._alone = {} if alone is None else alone
        self._held = ""  # decoded, not yet given out
        self._context: list[int] = []  # the tokens that became text last: decoders look back
        self._before = ""  # their text alone
        self._pending: list[int] = []  # tokens that are no text yet

    def push(self, token_id: int, *, can_stop: bool = True) -> tuple[str, str | None]:
        """Text that is now certain, and the stop string that ended it."""
        self._pending.append(token_id)
        text = self._new_text()
        if (text and not text.endswith("\ufffd")) or len(self._pending) >= MAX_PENDING:
            self._take(text)
        if not self._stop:
            return self._give(len(self._held)), None
        if can_stop and (found := self._find()):
            start, stop = found
            return self._give(start + len(stop) * self._include_stop), stop
        return self._give(len(self._held) - self._held_back()), None

    def flush(self) -> str:
        """What was held back, when the sequence ends otherwise; cut characters become U+FFFD."""
        self._take(self._new_text())
        return self._give(len(self._held))

    def _new_text(self) -> str:
        """What the pending tokens add to the text of their context."""
        both = self._decode(self._context + self._pending)
        return str(both[len(self._before) :])

    def _take(self, text: str) -> None:
        self._held += text
        self._context, self._pending = self._pending, []
        self._before = self._text_of_context()

    def _text_of_context(self) -> str:
        if len(self._context) != 1:
            return str(self._decode(self._context))
        token_id = self._context[0]
        text = self._alone.get(token_id)
        if text is None:
            text = str(self._decode(self._context))
            self._alone[token_id] = text
        return text

    def _give(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _find(self) -> tuple[int, str] | None:
        hits = [(self._held.find(stop), stop) for stop in self._stop if stop in self._held]
        return min(hits, default=None)

    def _held_back(self) -> int:
        """Length of the longest tail of the held text that begins a stop string."""
        for size in range(min(len(self._held), max(map(len, self._stop)) - 1), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
