"""Text that a base writes -> content and tool calls, piece by piece as it arrives.

Pure. Holds back what may be the beginning of a mark; a call is told as soon as its name is known,
its arguments as they come, exactly as they were written. Invariant: the pieces of a text are the
same however it was cut, and a call that cannot be read is content.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection

from loriner.api.pieces import Arguments, Call, Content, Piece
from loriner.api.reasoning import overlap
from loriner.api.tool_formats import ToolFormat

_ID_CHARS = string.ascii_letters + string.digits
_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAMED = re.compile(r"([A-Za-z0-9_.-]{1,64})(?:\[CALL_ID\]\w*)?\[ARGS\]\s*(?=\{)")
_NAMED_START = re.compile(r"[A-Za-z0-9_.-]{1,64}(\[[A-Z_]*(\](\w*(\[[A-Z]*(\]\s*)?)?)?)?)?")
_BETWEEN = re.compile(r"(?:\s|</tool_call>|[,;\]])+")


class JsonEnd:
    """Finds where a JSON object ends, fed in pieces; `depth` braces are open already."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_string, self._escaped = depth, False, False

    def find(self, text: str) -> int | None:
        """The index after the last brace in `text`, or None: then feed what follows."""
        for i, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
        return None


class ToolReader:
    """Reads one choice."""

    def __init__(
        self, form: ToolFormat, names: Collection[str], *, max_calls: int | None = None
    ) -> None:
        """`names`: of functions; a call without a mark must have one of them. Calls beyond
        `max_calls` are dropped."""
        self._form, self._names, self._max_calls = form, names, max_calls
        self._held = ""
        self._read = self._begin if form.is_bare else self._content
        self._end = JsonEnd()
        self._is_closing = False  # the object around the arguments is still open
        self._is_marked = False
        self.num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while True:
            before = self._read, len(self._held)
            self._read(pieces, False)
            if (self._read, len(self._held)) == before:
                return self._kept(pieces)

    def finish(self) -> list[Piece]:
        """What was held back."""
        pieces = self.feed("")
        if self._held:
            self._read(pieces, True)
        return self._kept(pieces)

    def _kept(self, pieces: list[Piece]) -> list[Piece]:
        if self._max_calls is None:
            return pieces
        return [
            piece
            for piece in pieces
            if not isinstance(piece, Call | Arguments) or piece.index < self._max_calls
        ]

    def _begin(self, pieces: list[Piece], is_last: bool) -> None:
        """At the start of a text that may be a call."""
        text = self._held.lstrip()
        if text or is_last:
            self._read = self._call if text.startswith("{") else self._content
            if is_last:
                self._read(pieces, True)

    def _content(self, pieces: list[Piece], is_last: bool) -> None:
        mark = self._form.mark
        before, found, after = self._held.partition(mark)
        if found:
            self._say(pieces, before.rstrip())
            self._held, self._is_marked, self._read = after, True, self._call
            return
        size = len(before)
        if not is_last:  # space before a mark is no content
            size = len(before[: size - overlap(before, mark)].rstrip())
        self._say(pieces, before[:size])
        self._held = before[size:]

    def _call(self, pieces: list[Piece], is_last: bool) -> None:
        """The head of a call: all until its arguments begin."""
        text = self._held.lstrip(" \t\r\n[,;" if self._is_marked else None)
        if head := _HEAD.match(text) or _NAMED.match(text):
            name = json.loads(f'"{head[1]}"') if text.startswith("{") else head[1]
            if self._is_marked or name in self._names:
                self._open(pieces, name)
                self._held, self._read = text[head.end() :], self._arguments
                self._is_closing = text.startswith("{")
                self._end = JsonEnd()
                return
            self._give_up(pieces)
        elif text.startswith("{"):
            end = JsonEnd().find(text)
            if end is not None:
                self._whole(pieces, text[:end], text[end:])
            elif is_last:
                self._give_up(pieces)
        elif is_last or (text and not _NAMED_START.fullmatch(text)):
            self._give_up(pieces)

    def _whole(self, pieces: list[Piece], text: str, rest: str) -> None:
        """A call in an unusual order of keys."""
        try:
            found = json.loads(text)
            name = found["name"]
            arguments = found.get("arguments", found.get("parameters", {}))
        except (ValueError, KeyError, TypeError):
            return self._give_up(pieces)
        if not isinstance(name, str) or not (self._is_marked or name in self._names):
            return self._give_up(pieces)
        self._open(pieces, name)
        written = arguments if isinstance(arguments, str) else json.dumps(arguments)
        pieces.append(Arguments(self.num_calls - 1, written))
        self._held, self._read = rest, self._after

    def _arguments(self, pieces: list[Piece], is_last: bool) -> None:
        end = self._end.find(self._held)
        size = len(self._held) if end is None else end
        if size:
            pieces.append(Arguments(self.num_calls - 1, self._held[:size]))
        self._held = self._held[size:]
        if end is not None:
            self._end = JsonEnd(depth=1)
            self._read = self._close if self._is_closing else self._after

    def _close(self, pieces: list[Piece], is_last: bool) -> None:
        """What else stands in the object around the arguments."""
        end = self._end.find(self._held)
        self._held = "" if end is None else self._held[end:]
        if end is not None:
            self._read = self._after

    def _after(self, pieces: list[Piece], is_last: bool) -> None:
        """Between two calls, or behind the last."""
        found = _BETWEEN.match(self._held)
        rest = self._held[found.end() :] if found else self._held
        if not rest:
            if is_last:
                self._held = ""
        elif "</tool_call>".startswith(rest) and not is_last:
            return
        elif rest.startswith("{") and self._form.name != "hermes":
            self._held, self._read = rest, self._call
        else:
            self._held, self._read = rest, self._content
            if is_last:
                self._content(pieces, True)

    def _open(self, pieces: list[Piece], name: str) -> None:
        made = "".join(secrets.choice(_ID_CHARS) for _ in range(self._form.id_chars))
        prefix = "call_" if self._form.id_chars > 9 else ""
        pieces.append(Call(self.num_calls, prefix + made, name))
        self.num_calls += 1

    def _give_up(self, pieces: list[Piece]) -> None:
        """It is no call: what was held is content, as it was written."""
        mark = self._form.mark if self._is_marked else ""
        self._say(pieces, mark + self._held)
        self._held, self._is_marked, self._read = "", False, self._content

    def _say(self, pieces: list[Piece], text: str) -> None:
        if text:
            pieces.append(Content(text))
