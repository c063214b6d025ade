"""One timed case and the figures derived from it; no engine is known here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

QUIET = 0.1  # a run in which tasks waited for a core for a larger share of the time is noise


@dataclass(frozen=True, slots=True)
class Case:
    """`rows` sequences decoded together on `adapters` different adapters; the median quiet run."""

    engine: str
    rows: int
    adapters: int
    num_new: int
    prefill_s: float
    decode_s: float  # from the first new token of all rows to the last one
    spread: float  # (slowest - fastest) / median of decode_s
    num_runs: int
    num_quiet: int  # 0: every run was disturbed, and the figures are of all of them
    note: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Decode only: the first token belongs to the prefill."""
        return self.rows * (self.num_new - 1) / self.decode_s

    @property
    def total_tokens_per_s(self) -> float:
        """New tokens over prefill and decode."""
        return self.rows * self.num_new / (self.prefill_s + self.decode_s)

    @property
    def step_ms(self) -> float:
        return 1e3 * self.decode_s / (self.num_new - 1)


def case_of(
    engine: str, num_new: int, raw: Mapping[str, Any], pressure: Callable[[float, float], float]
) -> Case:
    """Build a Case from what a worker wrote: rows, adapters, and the seconds of each run.

    `pressure(start, end)` is the share of that time in which some task waited for a core.
    """
    quiet = [run for run in raw["runs"] if pressure(run["start"], _end(run)) <= QUIET]
    runs = sorted(quiet or raw["runs"], key=lambda run: float(run["decode_s"]))
    median = runs[(len(runs) - 1) // 2]
    return Case(
        engine=engine,
        rows=raw["rows"],
        adapters=raw["adapters"],
        num_new=num_new,
        prefill_s=statistics.median(run["prefill_s"] for run in runs),
        decode_s=median["decode_s"],
        spread=(runs[-1]["decode_s"] - runs[0]["decode_s"]) / median["decode_s"],
        num_runs=len(raw["runs"]),
        num_quiet=len(quiet),
        note=raw.get("note", ""),
    )


def _end(run: Mapping[str, float]) -> float:
    return run["start"] + run["prefill_s"] + run["decode_s"]
