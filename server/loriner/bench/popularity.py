"""How a batch's rows spread over adapters: none, identical, distinct, uniform, zipf:a, skewed."""

from __future__ import annotations

import random

BASE = -1  # a row without an adapter
KINDS = ("none", "identical", "distinct", "uniform", "zipf:A", "skewed")


def check(popularity: str) -> str:
    """`popularity` if it is one. Raises ValueError."""
    kind, _, parameter = popularity.partition(":")
    if kind == "zipf" and float(parameter) > 0:
        return popularity
    if popularity not in KINDS or kind == "zipf":
        raise ValueError(f"{popularity!r} is none of {', '.join(KINDS)}")
    return popularity


def picks(popularity: str, rows: int, population: int, *, seed: int = 0) -> list[int]:
    """The adapter of each row, or BASE. `population` adapters exist for the random kinds.

    skewed: half of the rows on one adapter, each of the others on its own.
    """
    kind, _, parameter = check(popularity).partition(":")
    draw = random.Random(f"{popularity} {rows} {seed}")
    if kind == "none":
        return [BASE] * rows
    if kind == "identical":
        return [0] * rows
    if kind == "distinct":
        return list(range(rows))
    if kind == "skewed":
        return [max(0, row - rows // 2) for row in range(rows)]
    if kind == "uniform":
        return [draw.randrange(population) for _ in range(rows)]
    weights = [1 / (rank + 1) ** float(parameter) for rank in range(population)]
    return draw.choices(range(population), weights, k=rows)
