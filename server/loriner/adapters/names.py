"""What users call adapters: `tenant/name`, and `name@digest` for one of its generations.

Every method of the store and every door comes through here; nothing else splits or checks a name.
Invariant: a parsed name is safe as a path component, a label and a log field.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from loriner.errors import AdapterNotFoundError, InvalidRequestError

DEFAULT_TENANT = "default"
MIN_DIGEST_CHARS = 12

_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DIGEST_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_DIGEST_CHARS},64}}")


@dataclass(frozen=True, slots=True, order=True)
class AdapterName:
    """A checked name. `str(name)` is the full form, `tenant/short`."""

    tenant: str
    short: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.short}"


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A name and, when the caller wrote `name@digest`, at least 12 hex digits of one generation."""

    name: AdapterName
    digest: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}" if self.digest else str(self.name)


def parse_name(text: str, *, param: str = "name") -> AdapterName:
    """Check `tenant/name`; a bare `name` means tenant `default`. Raises InvalidRequestError."""
    parts = text.split("/") if len(text) <= 129 else []
    if len(parts) == 1:
        parts.insert(0, DEFAULT_TENANT)
    if len(parts) != 2 or not all(_is_part(part) for part in parts):
        raise InvalidRequestError(
            f"`{show(text)}` is not an adapter name: it must be `name` or `tenant/name`, each of "
            "1 to 64 of a-z 0-9 . _ - that start with a letter or digit, without `..`.",
            param,
        )
    if is_digest(parts[1]):
        raise InvalidRequestError("An adapter name must not look like a digest.", param)
    return AdapterName(*parts)


def parse_ref(text: str, *, param: str = "adapter") -> AdapterRef:
    """Check `name` or `tenant/name`, with `@digest` or not. Raises AdapterNotFoundError."""
    name, at, digest = text.partition("@")
    if at and not _DIGEST_PREFIX.fullmatch(digest):
        raise AdapterNotFoundError(show(text), param)
    try:
        return AdapterRef(parse_name(name), digest or None)
    except InvalidRequestError:
        raise AdapterNotFoundError(show(text), param) from None


def is_digest(text: str) -> bool:
    """Whether `text` is a whole generation digest: 64 lower-case hex digits."""
    return _DIGEST.fullmatch(text) is not None


def show(text: str, limit: int = 96) -> str:
    """`text` as it may stand in a message or a log line: printable ASCII, cut at `limit`."""
    safe = ascii(text[: limit + 1])[1:-1].replace("`", "'")
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."


def _is_part(text: str) -> bool:
    return _PART.fullmatch(text) is not None and ".." not in text
