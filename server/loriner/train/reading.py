"""Training files -> numbered rows: JSONL, a JSON array, or CSV with a header. Knows no meaning.

Invariant: every line of the file comes out once, as a row or as a fault with its line number.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loriner.errors import DataError

MAX_CELL_CHARS = 16 << 20
_ARRAYS = (".json",)
_TABLES = (".csv", ".tsv")


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that cannot be used, and why."""

    line: int  # from 1
    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """One object of the file."""

    line: int  # from 1
    values: Mapping[str, Any]


def read_rows(path: Path) -> Iterator[Row | Fault]:
    """The rows of `path`, by its ending: .csv, .tsv, .json (an array), else one object a line.

    Raises DataError when there is no such file or it is not UTF-8.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in _TABLES:
            yield from _read_table(path, "\t" if suffix == ".tsv" else ",")
        elif suffix in _ARRAYS:
            yield from _read_array(path)
        else:
            yield from _read_lines(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from None


def digest_file(path: Path) -> str:
    """SHA-256 of the file's bytes, 64 hex digits."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from None


def _read_lines(path: Path) -> Iterator[Row | Fault]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if text.strip():
                yield _parse(line, text)


def _parse(line: int, text: str) -> Row | Fault:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Fault(line, f"no JSON: {error}")
    return _row(line, values)


def _row(line: int, values: Any) -> Row | Fault:
    if not isinstance(values, dict):
        return Fault(line, f"a JSON object is expected, this is {type(values).__name__}")
    return Row(line, values)


def _read_array(path: Path) -> Iterator[Row | Fault]:
    """A whole file of one array; its entries count as lines. A .json file of lines is read too."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _read_lines(path)
        return
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}.") from None
    for number, values in enumerate(entries, 1):
        yield _row(number, values)


def _read_table(path: Path, delimiter: str) -> Iterator[Row | Fault]:
    csv.field_size_limit(MAX_CELL_CHARS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for values in reader:
                yield _cells(reader.line_num, values)
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num}: {error}.") from None


def _cells(line: int, values: dict[str | None, Any]) -> Row | Fault:
    if None in values:
        return Fault(line, "more cells than the header has columns")
    if any(value is None for value in values.values()):
        return Fault(line, "fewer cells than the header has columns")
    return Row(line, {str(key): value for key, value in values.items()})
