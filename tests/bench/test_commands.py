"""Every device benchmark from its command line, on a CPU and a tiny base: tables, JSON lines, exit
status."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loriner.adapters.store import Store
from loriner.bench.figures import Figures
from loriner.bench.load import tell_gaps
from loriner.cli import main
from loriner.engine.cpu_runner import CpuRunner

KINDS = ("decode", "kernels", "prefill", "load", "serve", "fairness", "many", "beside", "train")


class Ran:
    """One run: what it printed, and its JSON lines by kind."""

    def __init__(self, table: str, lines: list[dict[str, Any]]) -> None:
        self.table = table
        self.of = {kind: [line for line in lines if line["kind"] == kind] for kind in _kinds(lines)}


def _kinds(lines: list[dict[str, Any]]) -> set[str]:
    return {line["kind"] for line in lines}


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(kind: str, *flags: str, status: int = 0) -> Ran:
        file = tmp_path / "figures.jsonl"
        own, _, rest = " ".join(flags).partition(" -- ")
        command = ["bench", kind, "--device", "cpu", "--shape", "tiny", "--threads", "1"]
        command += ["--json", str(file), *own.split(), *(["--", *rest.split()] if rest else [])]
        assert main(command) == status
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return Ran(capsys.readouterr().out, lines)

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gpu_it_says_so_and_exits_with_2(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", kind]) == 2
    assert f"bench {kind} needs a CUDA device" in capsys.readouterr().err


def test_decode_prints_each_case_beside_its_bytes_and_the_base(bench: Any) -> None:
    ran = bench(
        "decode",
        "--rows 1,4 --popularity distinct,zipf:1.1 --ranks 2,4 --context 24 --new 12 --repeats 3",
    )
    machine, (limits,) = ran.of["machine"][0], ran.of["limits"]
    cases = {(case["rows"], case["popularity"]): case for case in ran.of["decode"]}

    assert {"commit", "date", "command", "cpu"} <= machine.keys()
    assert set(cases) == {(r, p) for r in (1, 4) for p in ("none", "distinct", "zipf:1.1")}
    mixed = cases[4, "distinct"]
    assert mixed["ranks"] == [2, 4] and mixed["num_adapters"] == 4
    assert abs(mixed["context"] - 24) <= 2
    assert mixed["kv_bytes"] == 4 * mixed["context"] * 2 * 2 * 1 * 64 * 4
    assert mixed["floor_ms"] == pytest.approx(1e3 * mixed["num_bytes"] / limits["read_bytes_per_s"])
    assert mixed["base_ms"] == cases[4, "none"]["step_ms"]
    assert cases[4, "none"]["adapters_bytes"] == 0
    assert "| 4    | distinct (4) | 2,4" in ran.table


def test_decode_shows_where_a_steps_time_goes(bench: Any) -> None:
    ran = bench("decode", "--rows 2 --popularity none --context 16 --new 8 --repeats 2 --profile")
    kernels = ran.of["kernel"]

    assert "| sum " in ran.table
    assert all(kernel["us"] > 0 and kernel["launches"] > 0 for kernel in kernels)
    assert kernels == sorted(kernels, key=lambda kernel: -kernel["us"])


def test_decode_refuses_a_context_that_the_shape_has_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["bench", "decode", "--device", "cpu", "--shape", "tiny", "--context", "9000"]

    assert main(command) == 2
    assert "context: the shape's is 4096 tokens" in capsys.readouterr().err


def test_kernels_are_right_and_timed(bench: Any) -> None:
    ran = bench("kernels", "--rows 1,3 --context 32 --repeats 2 --peers bf16")
    linears = {(one["linear"], one["rows"]): one for one in ran.of["linear"]}

    names = ("qkv", "o", "gate_up", "down", "all four")
    assert set(linears) == {(name, rows) for name in names for rows in (1, 3)}
    assert all(0 < one["error"] < 1e-5 for one in linears.values())
    together = sum(linears[name, 3]["us"] for name in names[:4])
    assert linears["all four", 3]["us"] == pytest.approx(together)
    assert all(one["peers"]["bf16"] > 0 for one in linears.values())
    others = {"lm_head", "norm", "rope and store", "attention", "sampler"}
    adapted = {f"{name} + adapters" for name in names[:4]}
    assert {op["op"] for op in ran.of["op"]} == others | adapted


def test_prefill_is_measured_with_and_without_an_adapter(bench: Any) -> None:
    ran = bench("prefill", "--tokens 48 --repeats 2 --ranks 4")
    none, adapter = ran.of["prefill"]

    assert (none["rank"], adapter["rank"]) == (0, 4)
    assert adapter["flop"] > none["flop"]
    assert adapter["flop_per_s"] == pytest.approx(1e3 * adapter["flop"] / adapter["ms"])


def test_load_times_every_tier_and_the_gaps_of_running_streams(bench: Any, tmp_path: Path) -> None:
    ran = bench(
        "load",
        "--streams 2 --loads 3 --trials 2 --prompt 8 --longest 512 --ranks 2 --folder",
        str(tmp_path),
    )

    tiers = {line["tier"]: line["ms"] for line in ran.of["load"]}
    assert set(tiers) == {"seated", "host", "disk", "disk, first time"}
    assert tiers["disk"] > tiers["seated"]
    gaps = {line["while"]: line for line in ran.of["gaps"]}
    assert set(gaps) == {"quiet", "loading", "loading and asking"}
    assert all(0 < of["median_ms"] <= of["p99_ms"] <= of["longest_ms"] for of in gaps.values())
    assert "6 adapters loaded of 6" in ran.table


def test_load_measures_both_ways_in_contexts_that_end_before_the_loads(
    bench: Any, tmp_path: Path
) -> None:
    ran = bench(
        "load",
        "--streams 2 --loads 1000 --trials 1 --prompt 8 --longest 1024 --ranks 2 --folder",
        str(tmp_path),
    )

    assert {of["while"] for of in ran.of["gaps"] if of["steps"] > 0 < of["p99_of_quiet"]} == {
        "quiet",
        "loading",
        "loading and asking",
    }
    assert "loaded of 2000: contexts of 1024 tokens had room for no more" in ran.table


def test_gaps_that_nobody_saw_are_told_as_none(capsys: pytest.CaptureFixture[str]) -> None:
    figures = Figures(argparse.Namespace(device="cpu", threads=1, commit="", json=None))
    tell_gaps({"quiet": [], "loading": [0.002, 0.004]}, figures)

    rows = [line.strip("| ").split() for line in capsys.readouterr().out.strip().splitlines()]
    assert rows[-2] == ["quiet", *("|", "0"), *("|", "none") * 4]
    assert rows[-1] == ["loading", *("|", "2"), *("|", "3.00"), *("|", "4.00") * 2, *("|", "none")]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--prompt 100 --longest 164", "longest: a stream of 164 tokens with a prompt of 100"),
        ("--prompt 4032", "longest: a stream of 4096 tokens"),
        ("--trials 0", "trials: at least 1."),
    ],
)
def test_load_refuses_what_leaves_it_nothing_to_measure(
    flags: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "load", "--device", "cpu", "--shape", "tiny", *flags.split()]

    assert main(command) == 2
    assert told in capsys.readouterr().err


def test_serve_streams_over_http_beside_the_engine_alone(bench: Any, tmp_path: Path) -> None:
    ran = bench(
        "serve",
        "--streams 3 --new 400 --prompt 8 --clients 2 --ranks 2 --folder",
        f"{tmp_path} -- --kv-bytes 16M",
    )
    http, alone = ran.of["serve"]

    assert (http["what"], alone["what"]) == ("over HTTP", "engine alone")
    assert http["of_engine"] == pytest.approx(http["tokens_per_s"] / alone["tokens_per_s"])
    assert 0 < http["gap_p99_ms"] <= http["gap_longest_ms"]
    assert ran.of["first_token"][0]["p50_ms"] > 0


def test_fairness_asks_alone_and_in_another_tenants_flood(bench: Any, tmp_path: Path) -> None:
    ran = bench(
        "fairness",
        "--prompts 8 --asked 3 --turns 1 --streams 6 --adapters 2 --ranks 2 --folder",
        f"{tmp_path} -- --kv-bytes 16M --max-sequences 2",
    )
    (measured,) = ran.of["fairness"]

    assert measured["ratio"] == measured["flooded_p95_ms"] / measured["alone_p95_ms"]
    assert measured["output_tokens_per_s"] > 0 and measured["waiting"] > 0
    assert 0 < measured["preemptions"] <= 3


MANY = "many --adapters 9 --streams 3 --seats 4 --hosted 2 --checked 3 --new 6 --ranks 2,4 --folder"


def test_many_adapters_come_from_every_tier_and_none_is_wrong(bench: Any, tmp_path: Path) -> None:
    ran = bench(*MANY.split(), str(tmp_path))
    (checked,) = ran.of["checked"]

    assert sum(line["requests"] for line in ran.of["many"]) == checked["num_requests"] == 18
    assert {line["tier"] for line in ran.of["many"]} >= {"gpu", "disk"}
    assert (checked["changed"], checked["wrong"], checked["num_checked"]) == ([], [], 3)
    assert checked["num_like_base"] == 0, "the adapters say nothing of their own"


def test_many_says_which_adapter_answered_for_another(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = CpuRunner.source

    def mixed_up(runner: CpuRunner, store: Store) -> Any:
        source, last = load(runner, store), list[str]()

        def other(generation: str) -> Any:
            last.append(generation)
            return source(last[0] if len(last) == 5 else generation)

        return other

    monkeypatch.setattr(CpuRunner, "source", mixed_up)
    ran = bench(*MANY.replace("--checked 3", "--checked 9").split(), str(tmp_path), status=1)
    (checked,) = ran.of["checked"]
    assert (checked["changed"], checked["wrong"]) == ([], [4])


def test_many_asks_for_room_on_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "many", "--device", "cpu", "--adapters", "9000", "--shape", "llama-2-70b"]

    assert main([*command, "--folder", str(tmp_path)]) == 2
    assert "GB; " in capsys.readouterr().err


def test_beside_measures_streams_quiet_and_while_a_job_trains(bench: Any, tmp_path: Path) -> None:
    ran = bench(
        "beside",
        "--streams 1,3 --window 2 --settle 0.5 --prompt 8 --new 100 --length 32 --rank 2"
        f" --job learning_rate=1e-3 --folder {tmp_path} -- --kv-bytes 16M",
    )
    lines = {(line["streams"], line["while"]): line for line in ran.of["beside"]}
    alone = lines.pop((0, "training alone"))

    assert set(lines) == {(n, w) for n in (1, 3) for w in ("quiet", "beside", "ratio")}
    assert alone["training_tokens_per_s"] > 0 and alone["job"] == {"learning_rate": 1e-3}
    for count in (1, 3):
        quiet, beside = lines[count, "quiet"], lines[count, "beside"]
        assert beside["gap_p50_ms"] <= beside["gap_p99_ms"] <= beside["gap_longest_ms"]
        assert beside["gap_longest_ms"] > 0
        assert beside["training_tokens_per_s"] > 0
        ratio = lines[count, "ratio"]
        assert ratio["tokens_per_s"] == beside["tokens_per_s"] / quiet["tokens_per_s"]
    assert ran.table.count("| ratio ") == 2
    assert [left.name for left in tmp_path.iterdir()] == ["figures.jsonl"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--training-duty 0.3", "training_duty: jobs on a CPU have a low priority instead."),
        ("--train nowhere.jsonl", "train: nowhere.jsonl is no file."),
        ("--window 0", "window: more than 0 seconds"),
        ("--new 4090", "new: prompt and answer are at most 4096 tokens."),
    ],
)
def test_beside_refuses_what_it_cannot_measure(
    flags: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "beside", "--device", "cpu", "--shape", "tiny", *flags.split()]

    assert main(command) == 2
    assert told in capsys.readouterr().err


def test_base_writes_a_folder_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "base")

    assert main(["bench", "base", "tiny", target, "--device", "cpu"]) == 0
    assert "GB in" in capsys.readouterr().out
    assert main(["bench", "base", "tiny", target, "--device", "cpu"]) == 1
    assert "exists already" in capsys.readouterr().err


def test_train_prints_memory_and_speed_of_jobs_alone_together_and_of_the_peer(bench: Any) -> None:
    ran = bench("train", "--length 32 --rank 2 --steps 2 --jobs 1,2")
    alone, together, peer = ran.of["train"]

    assert (alone["jobs"], together["jobs"]) == (1, 2)
    assert together["tokens_per_step"] == 2 * alone["tokens_per_step"] == 64
    assert alone["losses"] == pytest.approx(together["losses"], rel=1e-4)
    assert peer["trainer"] == "PEFT + transformers Trainer"
    assert len(peer["step_s"]) == 2
    assert "| PEFT + transformers Trainer |" in ran.table
