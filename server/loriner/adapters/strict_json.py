"""JSON from strangers: one object, bounded in bytes and depth, with no key twice and no NaN.

Knows no adapter format. Invariant: what this returns, every other reader would read the same way.
"""

from __future__ import annotations

import json
from typing import Any

from loriner.adapters.names import show
from loriner.errors import InvalidAdapterError

MAX_DEPTH = 8


def parse_object(data: bytes, what: str, max_bytes: int) -> dict[str, Any]:
    """The JSON object in `data`. Raises InvalidAdapterError; `what` names the document in it."""
    if len(data) > max_bytes:
        raise InvalidAdapterError([f"{what} has more than {max_bytes} bytes"])
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise InvalidAdapterError([f"{what} is nested too deeply"]) from None
    except ValueError as error:
        raise InvalidAdapterError([f"{what} is not valid JSON: {_reason(error)}"]) from None
    if not isinstance(value, dict):
        raise InvalidAdapterError([f"{what} is not a JSON object"])
    if _is_deeper(value, MAX_DEPTH):
        raise InvalidAdapterError([f"{what} is nested more than {MAX_DEPTH} levels deep"])
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key `{show(twice)}` occurs twice")
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def _is_deeper(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return any(isinstance(item, dict | list) for item in level)


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
