"""Plain data -> a schema, whichever door it came through. Knows no field names of its own.

Invariant: whatever the data is, the caller gets an InvalidRequestError that names the field, or a
valid model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from loriner.adapters.names import show
from loriner.errors import InvalidRequestError, LorinerError

M = TypeVar("M", bound=BaseModel)


@contextmanager
def renamed(path_of: Callable[[str], str]) -> Iterator[None]:
    """Within it, errors name fields as `path_of` has them."""
    try:
        yield
    except LorinerError as error:
        param = getattr(error, "param", None)
        if isinstance(param, str) and (path := path_of(param)) != param:
            error.param = path  # type: ignore[attr-defined]
            name = rf"(?<![\w.]){re.escape(param)}(?!\w)"
            error.args = (re.sub(name, lambda _: path, str(error), count=1),)
        raise


def validate(model: type[M], data: dict[str, Any]) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False, include_context=False), data) from None


def _invalid(details: Sequence[ErrorDetails], data: object) -> InvalidRequestError:
    field = details[0]["loc"][:1]
    # Of the errors of one field's union members the deepest came nearest to what was meant.
    same = [detail for detail in details if detail["loc"][:1] == field]
    first = max(same, key=lambda detail: len(_param(detail["loc"], data, False) or ""))
    param = _param(first["loc"], data, first["type"] == "missing")
    if first["type"] == "missing":
        return InvalidRequestError(f"Missing required parameter: '{param}'.", param)
    text = first["msg"][:1].lower() + first["msg"][1:]
    return InvalidRequestError(f"Invalid value for '{param}': {text}.", param)


def _param(loc: Sequence[str | int], data: object, missing: bool) -> str | None:
    """`messages[0].content` from a pydantic location, leaving out the tags of union members."""
    path = ""
    for part in loc:
        if isinstance(part, int) and isinstance(data, list) and part < len(data):
            path, data = f"{path}[{part}]", data[part]
        elif isinstance(data, dict) and part in data:
            path, data = f"{path}.{part}" if path else str(part), data[part]
        elif missing and part == loc[-1]:
            path = f"{path}.{part}" if path else str(part)
    return show(path) if path else None
