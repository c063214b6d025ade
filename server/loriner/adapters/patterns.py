"""The part of regular expressions that configs really use, matched in linear time.

PEFT runs keys of a config through `re`; a stranger's key may then take for ever. Here a pattern is
literal text, `.`, `\\d`, `\\w`, `[...]`, `\\b`, `^`, `$`, groups of alternatives, and repeats of
single characters. Anything else is refused. Invariant: whatever is accepted matches exactly as `re`
would on a module name.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass

MAX_PATTERN_CHARS = 1024
MAX_DEPTH = 8
MAX_REPEAT = 16

Positions = int  # bit i is set when what matched so far may end before character i
Chars = frozenset[str] | None  # None is any character
Step = Callable[["_Text", Positions], Positions]

_LITERAL = re.compile(r"[A-Za-z0-9_.-]+")
_REPEAT = re.compile(r"\{([0-9]{1,2})(,?)([0-9]{0,2})\}")
_ASCII = frozenset(map(chr, range(128)))
_DIGITS = frozenset(string.digits)
_WORDS = frozenset(string.ascii_letters + string.digits + "_")
_CLASSES = {"d": _DIGITS, "w": _WORDS}


class UnsafePatternError(ValueError):
    """The pattern is outside the subset; the message says where."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A checked pattern; PEFT's two ways to match it against a module's full name."""

    source: str
    is_literal: bool
    _run: Step

    def matches_whole(self, name: str) -> bool:
        """As `re.fullmatch(source, name)`."""
        text = _Text(name)
        return bool(self._run(text, 1) & text.end)

    def matches_tail(self, name: str) -> bool:
        """As PEFT's `get_pattern_key`: `re.match(rf"(.*\\.)?({source})$", name)`."""
        if self.is_literal:
            return self._matches_literal_tail(name)
        text = _Text(name)
        return bool(self._run(text, 1 | text.where(frozenset(".")) << 1) & text.end)

    def _matches_literal_tail(self, name: str) -> bool:
        rest = len(name) - len(self.source)
        if rest < 0 or (rest > 0 and name[rest - 1] != "."):
            return False
        pairs = zip(self.source, name[rest:], strict=True)
        return all(wanted in (".", char) for wanted, char in pairs)


def compile_pattern(source: str) -> Pattern:
    """Check and prepare `source`. Raises UnsafePatternError."""
    if not 1 <= len(source) <= MAX_PATTERN_CHARS:
        raise UnsafePatternError(f"it must have 1 to {MAX_PATTERN_CHARS} characters")
    if not source.isascii():
        raise UnsafePatternError("it must be ASCII")
    return Pattern(source, _LITERAL.fullmatch(source) is not None, _Parser(source).parse())


class _Text:
    """A name, and for each set of characters the positions at which one of them stands."""

    __slots__ = ("_where", "end", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.end: Positions = 1 << len(name)
        self._where: dict[Chars, Positions] = {None: self.end - 1}

    def where(self, chars: Chars) -> Positions:
        if chars not in self._where:
            assert chars is not None
            self._where[chars] = sum((c in chars) << i for i, c in enumerate(self.name))
        return self._where[chars]


def _one(chars: Chars) -> Step:
    return lambda text, at: (at & text.where(chars)) << 1


def _many(chars: Chars) -> Step:
    """Zero or more: the carry of an addition runs through each stretch (Parabix MatchStar)."""

    def run(text: _Text, at: Positions) -> Positions:
        where = text.where(chars)
        return (((at & where) + where) ^ where) | at

    return run


def _optional(step: Step) -> Step:
    return lambda text, at: at | step(text, at)


def _at_start(text: _Text, at: Positions) -> Positions:
    return at & 1


def _at_end(text: _Text, at: Positions) -> Positions:
    return at & text.end


def _at_boundary(text: _Text, at: Positions) -> Positions:
    words = text.where(_WORDS)
    return at & (words ^ (words << 1))


def _sequence(steps: list[Step]) -> Step:
    def run(text: _Text, at: Positions) -> Positions:
        for step in steps:
            if not at:
                break
            at = step(text, at)
        return at

    return run


def _choice(branches: list[Step]) -> Step:
    def run(text: _Text, at: Positions) -> Positions:
        result = 0
        for branch in branches:
            result |= branch(text, at)
        return result

    return branches[0] if len(branches) == 1 else run


class _Parser:
    """Recursive descent; every step it builds is run at most once for each name."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._next = 0

    def parse(self) -> Step:
        step = self._alternatives(0)
        if self._peek():
            raise UnsafePatternError("a `)` closes nothing")
        return step

    def _peek(self) -> str:
        return self._source[self._next : self._next + 1]

    def _take(self) -> str:
        char = self._peek()
        if not char:
            raise UnsafePatternError("it ends too early")
        self._next += 1
        return char

    def _skip(self, text: str) -> bool:
        found = self._source.startswith(text, self._next)
        self._next += len(text) if found else 0
        return found

    def _alternatives(self, depth: int) -> Step:
        if depth > MAX_DEPTH:
            raise UnsafePatternError(f"groups are nested more than {MAX_DEPTH} deep")
        branches = [self._branch(depth)]
        while self._skip("|"):
            branches.append(self._branch(depth))
        return _choice(branches)

    def _branch(self, depth: int) -> Step:
        steps = []
        while self._peek() not in ("", "|", ")"):
            steps.append(self._item(depth))
        return _sequence(steps)

    def _item(self, depth: int) -> Step:
        char = self._take()
        if char == "(":
            return self._group(depth)
        if char == "^":
            return self._bare(_at_start)
        if char == "$":
            return self._bare(_at_end)
        if char == "\\" and self._skip("b"):
            return self._bare(_at_boundary)
        if char in "*+?{}]":
            raise UnsafePatternError(f"`{char}` has no meaning there")
        return self._repeated(self._chars(char))

    def _bare(self, step: Step) -> Step:
        if self._peek() in ("*", "+", "?", "{"):
            raise UnsafePatternError("only a character can be repeated")
        return step

    def _group(self, depth: int) -> Step:
        if self._peek() == "?" and not self._skip("?:"):
            raise UnsafePatternError("only plain groups `(...)` and `(?:...)` are taken")
        step = self._alternatives(depth + 1)
        if not self._skip(")"):
            raise UnsafePatternError("a `(` is not closed")
        if self._peek() in ("*", "+", "{"):
            raise UnsafePatternError("a group must not be repeated")
        if self._skip("?"):
            self._end_repeat()
            return _optional(step)
        return step

    def _chars(self, char: str) -> Chars:
        if char == ".":
            return None
        if char == "\\":
            return self._escape()
        return self._set() if char == "[" else frozenset(char)

    def _escape(self) -> frozenset[str]:
        char = self._take()
        if char in _CLASSES:
            return _CLASSES[char]
        if char.isalnum():
            raise UnsafePatternError(f"`\\{char}` is not taken")
        return frozenset(char)

    def _set(self) -> frozenset[str]:
        negated = self._skip("^")
        chars: set[str] = set()
        while (char := self._take()) != "]":
            if char == "[":
                raise UnsafePatternError("a `[` inside `[...]` is not taken")
            if char in "-&|~" and self._peek() == char:  # `re` says it will mean something else
                raise UnsafePatternError(f"`{char * 2}` inside `[...]` is not taken")
            low = self._escape() if char == "\\" else frozenset(char)
            if self._peek() == "-" and self._source[self._next + 1 : self._next + 2] != "]":
                self._next += 1
                chars |= self._range(low, self._take())
            else:
                chars |= low
        if not chars:
            raise UnsafePatternError("a `[]` is empty")
        return _ASCII - chars if negated else frozenset(chars)

    def _range(self, low: frozenset[str], high: str) -> set[str]:
        (first, *more) = sorted(low)
        if more or high in "\\[-" or not first <= high:
            raise UnsafePatternError("a range in `[...]` must go from one character to another")
        return {chr(code) for code in range(ord(first), ord(high) + 1)}

    def _repeated(self, chars: Chars) -> Step:
        one, many = _one(chars), _many(chars)
        if self._skip("*"):
            step = many
        elif self._skip("+"):
            step = _sequence([one, many])
        elif self._skip("?"):
            step = _optional(one)
        elif self._peek() == "{":
            step = self._counted(one, many)
        else:
            return one
        self._end_repeat()
        return step

    def _counted(self, one: Step, many: Step) -> Step:
        match = _REPEAT.match(self._source, self._next)
        if not match:
            raise UnsafePatternError("`{...}` must be a count such as {2}, {1,} or {1,3}")
        self._next = match.end()
        low = int(match[1])
        high = int(match[3]) if match[3] else low
        if (match[3] and not match[2]) or not low <= high <= MAX_REPEAT:
            raise UnsafePatternError(f"a count must go up and be at most {MAX_REPEAT}")
        if match[2] and not match[3]:
            return _sequence([one] * low + [many])
        return _sequence([one] * low + [_optional(one)] * (high - low))

    def _end_repeat(self) -> None:
        self._skip("?")  # lazy: the same names match
        if self._peek() in ("*", "+", "?", "{"):
            raise UnsafePatternError("a repeat of a repeat is not taken")
