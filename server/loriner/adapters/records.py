"""What the store answers with: an adapter as its users see it, and the receipt of a publish."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loriner.adapters.names import MIN_DIGEST_CHARS
from loriner.errors import AdapterConflictError, InvalidRequestError

READY = "ready"
QUARANTINED = "quarantined"
OTHER_BASE = "other base"

_DIGEST_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_DIGEST_CHARS},64}}")


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A name and the generation it stands for."""

    name: str  # tenant/name
    short_name: str
    generation: str
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    num_bytes: int
    pinned: bool
    created_at: int  # unix seconds at which the name came to stand for this generation
    alias_of: str | None  # the name it was aliased to, if it was not published itself
    base_digest: str | None  # the base that the adapter says it was trained on
    source: str  # where it came from: upload, path, train, ...
    state: str = READY  # ready | quarantined | other base
    has_template: bool = False  # a chat template of its own


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What a publish did: every tensor was used, in this many of the base's modules."""

    name: str
    generation: str
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    num_bytes: int
    modules_matched: int
    modules_total: int
    created_at: int
    existed: bool  # the same weights were in the store already; no bytes were added
    ignored: tuple[str, ...] = ()  # files of the upload that are no part of an adapter


def check_expected(current: str | None, name: str, expected: str | None) -> None:
    """Compare-and-swap: `current` is the generation that `name` stands for, None if there is none.

    `expected` None asks for nothing, "" for a new name, else for at least 12 hex digits of
    `current`. Raises AdapterConflictError, or InvalidRequestError when `expected` is no digest.
    """
    if expected is None:
        return
    if expected and not _DIGEST_PREFIX.fullmatch(expected):
        raise InvalidRequestError(
            f"expected_generation must be {MIN_DIGEST_CHARS} to 64 hex digits, or empty.",
            "expected_generation",
        )
    if current is None and expected:
        raise AdapterConflictError(f"The adapter `{name}` does not exist yet.")
    if current is not None and not expected:
        raise AdapterConflictError(f"The adapter `{name}` exists already.")
    if current is not None and not current.startswith(expected):
        raise AdapterConflictError(
            f"The adapter `{name}` stands for generation {current[:12]}, not {expected[:12]}."
        )
