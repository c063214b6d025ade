"""Tokens -> text, incrementally: never half a character, never a piece of a stop string.

Wraps `tokenizers`' DecodeStream, which holds bytes back until they make whole characters; on top of
it text that might be the beginning of a stop string is held back until it is known not to be.
"""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """The text of one sequence."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], include_stop: bool) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop, self._include_stop = stop, include_stop
        self._held = ""  # decoded, not yet given out
        self._ids: list[int] = []
        self._num_chars = 0  # decoded so far, held or given

    def push(self, token_id: int, *, can_stop: bool = True) -> tuple[str, str | None]:
        """Text that is now certain, and the stop string that ended it."""
        self._ids.append(token_id)
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._num_chars += len(text)
        self._held += text
        if not self._stop:
            return self._give(len(self._held)), None
        if can_stop and (found := self._find()):
            start, stop = found
            return self._give(start + len(stop) * self._include_stop), stop
        return self._give(len(self._held) - self._held_back()), None

    def flush(self) -> str:
        """What was held back, when the sequence ends otherwise; cut characters become U+FFFD."""
        rest = self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._num_chars :]
        self._held += rest
        self._num_chars += len(rest)
        return self._give(len(self._held))

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
