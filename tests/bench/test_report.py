"""Timed cases, the figures derived from them, and the tables they are printed in."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from loriner.bench import report
from loriner.bench.cases import Case, case_of
from loriner.bench.served import Served

MACHINE = {"cpu": "some cpu", "threads": "2"}


def case(engine: str, rows: int, adapters: int, tokens_per_s: float, note: str = "") -> Case:
    num_new = 11
    decode_s = rows * (num_new - 1) / tokens_per_s
    return Case(engine, rows, adapters, num_new, 0.1, decode_s, 0.0, 5, 5, note)


def raw(*decode_s: float) -> dict[str, Any]:
    runs = [{"start": 9.0 * i, "prefill_s": 0.5, "decode_s": s} for i, s in enumerate(decode_s)]
    return {"rows": 4, "adapters": 0, "runs": runs}


def test_a_case_is_its_median_run_and_says_how_far_the_runs_are_apart() -> None:
    timed = case_of("us", 11, raw(3.0, 1.0, 2.0), lambda start, end: 0.0)

    assert timed.decode_s == 2.0
    assert timed.spread == 1.0
    assert timed.tokens_per_s == 20.0  # 4 rows x 10 tokens after the first
    assert timed.total_tokens_per_s == pytest.approx(17.6)  # 44 tokens in 2.5 s
    assert timed.step_ms == 200.0
    assert timed.num_quiet == timed.num_runs == 3


def test_disturbed_runs_do_not_count_while_there_are_quiet_ones() -> None:
    timed = case_of("us", 11, raw(8.0, 2.0, 9.0), lambda start, end: float(end - start > 5))

    assert timed.decode_s == 2.0
    assert (timed.num_quiet, timed.num_runs) == (1, 3)

    disturbed = case_of("us", 11, raw(8.0, 7.0, 9.0), lambda start, end: 1.0)

    assert disturbed.decode_s == 8.0
    assert disturbed.num_quiet == 0


def test_targets_are_ratios_between_engines_of_the_same_run() -> None:
    cases = {
        "loriner": [
            case("us", 1, 0, 50.0),
            case("us", 8, 0, 220.0),
            case("us", 8, 8, 210.0),
            case("us", 8, 4, 999.0, note="mixed"),
        ],
        "transformers": [case("transformers", 1, 0, 40.0)],
    }
    table = report.target_table(cases)

    lines = [line.replace(" ", "") for line in table.splitlines()[2:]]
    assert lines == [
        "|alone/transformersfp32alone|1.30|1.25|no|",
        "|8adapters/llama.cpp8rows,noadapter|0.60|-|notmeasured|",
        "|8adapters/alone|4.00|4.20|yes|",
        "|8adapters/8rows,noadapter|0.85|0.95|yes|",
    ]


def test_a_disturbed_figure_on_either_side_gets_no_verdict() -> None:
    quiet, alone = case("us", 8, 8, 400.0), case("us", 1, 0, 50.0)
    disturbed = dataclasses.replace(alone, num_quiet=0)

    assert "| yes" in report.target_table({"loriner": [quiet, alone]})
    table = report.target_table({"loriner": [quiet, disturbed]})
    assert "8.00" in table and "too noisy to say" in table and "| yes" not in table


def test_the_report_names_machine_missing_peers_and_start_up() -> None:
    text = report.render(
        MACHINE,
        {"loriner": [case("us", 1, 0, 50.0)]},
        {"llama.cpp": "no compiler"},
        Served(4.24, 700.0, 750.0),
    )

    assert "cpu=some cpu  threads=2" in text
    assert "not measured: llama.cpp: no compiler" in text
    assert "ready in 4.2 s (target 10 s); resident 700 MiB" in text


def test_json_lines_carry_every_figure() -> None:
    lines = report.json_lines(MACHINE, {"us": [case("us", 8, 8, 200.0)]}, None).splitlines()
    machine, timed = map(json.loads, lines)

    assert machine == {"kind": "machine", **MACHINE}
    assert timed["tokens_per_s"] == pytest.approx(200.0)
    assert timed["rows"] == timed["adapters"] == 8
