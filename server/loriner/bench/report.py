"""Cases as a Markdown table, the targets they are held against, and JSON lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loriner.bench.cases import Case
from loriner.bench.served import Served

START_TARGET_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """`case / other` has to reach `wanted`; both are (engine key, rows, adapters)."""

    text: str
    wanted: float
    case: tuple[str, int, int]
    other: tuple[str, int, int]


OURS_ALONE, OURS_MIXED = ("loriner", 1, 0), ("loriner", 8, 8)
TARGETS = (
    Target("alone / transformers fp32 alone", 1.3, OURS_ALONE, ("transformers", 1, 0)),
    Target("8 adapters / llama.cpp 8 rows, no adapter", 0.6, OURS_MIXED, ("llama.cpp", 8, 0)),
    Target("8 adapters / alone", 4.0, OURS_MIXED, OURS_ALONE),
    Target("8 adapters / 8 rows, no adapter", 0.85, OURS_MIXED, ("loriner", 8, 0)),
)


def render(
    machine: Mapping[str, str],
    cases: Mapping[str, list[Case]],
    missing: Mapping[str, str],
    served: Served | None,
) -> str:
    """The whole report. `cases` and `missing` are keyed by engine key."""
    parts = [
        "  ".join(f"{key}={value}" for key, value in machine.items()),
        case_table(case for group in cases.values() for case in group),
    ]
    parts += [f"not measured: {key}: {reason}" for key, reason in missing.items()]
    if served is not None:
        parts.append(
            f"serve: ready in {served.start_s:.1f} s (target {START_TARGET_S:.0f} s); resident"
            f" {served.ready_mib:.0f} MiB when ready, {served.used_mib:.0f} MiB after an answer"
        )
    if "loriner" in cases:
        parts.append(target_table(cases))
    return "\n\n".join(parts) + "\n"


def case_table(cases: Iterable[Case]) -> str:
    head = (
        "engine",
        "rows",
        "adapters",
        "tokens/s",
        "with prefill",
        "ms/step",
        "spread",
        "quiet runs",
    )
    rows = [
        (
            f"{case.engine}{f': {case.note}' if case.note else ''}",
            str(case.rows),
            str(case.adapters),
            f"{case.tokens_per_s:.1f}",
            f"{case.total_tokens_per_s:.1f}",
            f"{case.step_ms:.2f}",
            f"{case.spread:.0%}",
            f"{case.num_quiet}/{case.num_runs}",
        )
        for case in cases
    ]
    return markdown(head, rows)


def target_table(cases: Mapping[str, list[Case]]) -> str:
    """Every target with its ratio. Figures of disturbed runs get no verdict: they may flatter
    us."""
    found = {
        (key, case.rows, case.adapters): case
        for key, group in cases.items()
        for case in group
        if not case.note
    }
    rows = []
    for target in TARGETS:
        case, other = found.get(target.case), found.get(target.other)
        ratio, verdict = "-", "not measured"
        if case is not None and other is not None:
            reached = case.tokens_per_s / other.tokens_per_s
            ratio, verdict = f"{reached:.2f}", "yes" if reached >= target.wanted else "no"
            if not (case.num_quiet and other.num_quiet):
                verdict = "too noisy to say"
        rows.append((target.text, f"{target.wanted:.2f}", ratio, verdict))
    return markdown(("tokens/s of", "wanted", "got", "reached"), rows)


def json_lines(
    machine: Mapping[str, str], cases: Mapping[str, list[Case]], served: Served | None
) -> str:
    rows: list[dict[str, object]] = [{"kind": "machine", **machine}]
    for key, group in cases.items():
        for case in group:
            speed = {"tokens_per_s": case.tokens_per_s, "step_ms": case.step_ms}
            rows.append({"kind": "case", "key": key, **dataclasses.asdict(case), **speed})
    if served is not None:
        rows.append({"kind": "serve", **dataclasses.asdict(served)})
    return "".join(json.dumps(row) + "\n" for row in rows)


def markdown(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
