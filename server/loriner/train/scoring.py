"""Scores of answers: exact, json, number, json.KEY; and how sure one can be of a share.

Pure: texts in, numbers out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence

from loriner.errors import ConfigError

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact(given: str, wanted: str) -> bool:
    """Equal but for white space around."""
    return given.strip() == wanted.strip()


def same_json(given: str, wanted: str) -> bool:
    """Equal as JSON values; where the wanted text is no JSON, as texts."""
    try:
        value = json.loads(wanted)
    except ValueError:
        return exact(given, wanted)
    try:
        return bool(json.loads(given) == value)
    except ValueError:
        return False


def same_number(given: str, wanted: str) -> bool:
    """The last numbers in both are equal: `#### 72` or "that makes 72."."""
    ours, theirs = last_number(given), last_number(wanted)
    return theirs is not None and ours == theirs


def last_number(text: str) -> float | None:
    found = _NUMBER.findall(text.rsplit("####", 1)[-1]) or _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


SCORERS: Mapping[str, Callable[[str, str], bool]] = {
    "exact": exact,
    "json": same_json,
    "number": same_number,
}


def scorer(metric: str) -> Callable[[str, str], bool]:
    """One of SCORERS, or `json.KEY`: whether both are JSON objects with an equal KEY. Raises
    ConfigError for another name."""
    kind, _, key = metric.partition(".")
    if kind == "json" and key:
        return lambda given, wanted: same_field(given, wanted, key)
    if metric not in SCORERS:
        raise ConfigError(f"{metric!r} is not one of {', '.join(SCORERS)}, json.KEY.")
    return SCORERS[metric]


def same_field(given: str, wanted: str, key: str) -> bool:
    """Equal in the value of one key, whatever the others are."""
    try:
        ours, theirs = json.loads(given), json.loads(wanted)
    except ValueError:
        return False
    are_objects = isinstance(ours, dict) and isinstance(theirs, dict)
    return are_objects and key in ours and key in theirs and bool(ours[key] == theirs[key])


def wilson(num_right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (E. B. Wilson, JASA 22, 1927, equation 4)."""
    if not count:
        return 0.0, 1.0
    share, square = num_right / count, z * z
    middle = share + square / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return (middle - half) / (1 + square / count), (middle + half) / (1 + square / count)


def mean_interval(rows: Sequence[Sequence[float]], z: float = 1.96) -> tuple[float, float, float]:
    """(mean, low, high) of all values, where those of a row are not independent: the ratio of two
    sums over rows (W. G. Cochran, Sampling Techniques, 3rd edition, section 2.11), and the normal
    approximation."""
    count, num_rows = sum(map(len, rows)), len(rows)
    mean = math.fsum(value for row in rows for value in row) / count
    if num_rows < 2:
        return mean, -math.inf, math.inf
    squares = math.fsum(math.fsum(value - mean for value in row) ** 2 for row in rows)
    half = z * math.sqrt(squares * num_rows / (num_rows - 1)) / count
    return mean, mean - half, mean + half
