"""`loriner train` from the outside: plans, runs, Ctrl-C, resume, several jobs, clear errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from loriner.cli import main
from loriner.train.canaries import TOLERANCES
from tests.train.conftest import PIRATE, WriteRows, chat

FLAGS = ["--device", "cpu", "--num-threads", "1", "--samples", "1", "--sample-tokens", "4"]
FLAGS += ["--rank", "2", "--batch", "2", "--learning-rate", "1e-2", "--max-length", "160"]


def arguments(tiny: Path, out: Path, *more: str) -> list[str]:
    data = ["--data", str(PIRATE), "--name", "pirate", "--out", str(out)]
    return ["train", "--base", str(tiny), *FLAGS, *data, *more]


def metrics(out: Path, event: str = "step") -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def test_a_dry_run_prints_the_plan_and_trains_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tiny, tmp_path / "run", "--epochs", "2", "--dry-run")) == 0
    shown = capsys.readouterr().out

    assert "24 rows, 24 documents" in shown
    assert "pirate: 24 steps (1 of warm-up)" in shown
    assert re.search(r"trainable: \d+ of \d+ parameters \(4.33%\)", shown)
    assert "memory: about" in shown
    assert not (tmp_path / "run").exists()


def test_a_process_tells_its_own_memory_not_that_of_its_parent() -> None:
    tell = "from loriner.train.progress import resident_peak; print(resident_peak())"
    parent = f"""
import subprocess, sys
kept = b"x" * (1 << 30)
subprocess.run([sys.executable, "-c", {tell!r}], check=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", parent], env=environment, capture_output=True, text=True, timeout=60
    )
    assert 50 << 20 < int(ran.stdout) < 1 << 30, ran.stderr


@pytest.mark.parametrize("more", [(), ("--rank", "64", "--gradient-checkpointing")])
def test_a_process_takes_what_its_plan_says(
    more: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    """Of a tiny base, where most of it is the process itself."""
    command = [*arguments(tiny, tmp_path / "run"), "--steps", "2", "--eval-split", "0.2", *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-m", "loriner", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    planned = re.search(r"memory: about ([\d.]+) GiB on cpu in float32", ran.stdout)
    assert planned is not None, ran.stderr
    taken = max(record["memory_bytes"] for record in metrics(tmp_path / "run")) / 2**30

    assert 0.9 * taken <= float(planned[1]) <= 1.35 * taken


def test_a_run_leaves_an_adapter_metrics_and_a_checkpoint(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(tiny, out, "--steps", "4", "--eval-split", "0.2")) == 0
    shown = capsys.readouterr().out

    assert "pirate: step 4/4  loss" in shown
    assert "Gate passed" in shown
    assert [record["step"] for record in metrics(out)] == [1, 2, 3, 4]
    assert {"loss", "learning_rate", "num_tokens", "memory_bytes"} <= set(metrics(out)[0])
    assert metrics(out, "eval")[0]["step"] == 0
    names = {path.name for path in (out / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png"} <= names
    assert main(arguments(tiny, out, "--steps", "4")) == 1
    assert "holds a run already: give --resume" in capsys.readouterr().err


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_a_stopped_run_goes_on_exactly_and_says_how_if_it_can(
    number: signal.Signals, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    steps = ["--steps", "100", "--dropout", "0.1", "--save-every", "4"]
    assert main(arguments(tiny, whole, *steps)) == 0

    command = [sys.executable, "-m", "loriner", *arguments(tiny, stopped, *steps)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    begun = time.time()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    deadline = time.monotonic() + 60
    while not ((stopped / "metrics.jsonl").exists() and len(metrics(stopped)) > 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=60)

    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert "To go on: loriner train" in shown
        assert "--resume" in shown
    assert 4 < len((stopped / "metrics.jsonl").read_text().splitlines()) < 100
    capsys.readouterr()
    assert main(arguments(tiny, stopped, *steps, "--resume")) == 0
    assert "Resuming" in capsys.readouterr().out
    assert [r["loss"] for r in metrics(stopped)] == [r["loss"] for r in metrics(whole)]
    assert all(r["memory_bytes"] > 0 and r["tokens_per_s"] > 0 for r in metrics(stopped))
    times = [r["at"] for r in metrics(stopped)]
    assert begun < times[0] and times == sorted(times)


def test_a_run_stopped_after_its_last_step_says_how_to_go_on(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C when its gate, samples and canaries are asked for."""
    out, steps = tmp_path / "run", ["--steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loriner.train.save.finish", Mock(side_effect=KeyboardInterrupt))
        patch.setattr(sys, "argv", ["loriner", *arguments(tiny, out, *steps)])
        assert main(sys.argv[1:]) == 130
    shown = capsys.readouterr().out

    assert "Saved. To go on: loriner train" in shown
    assert "--resume" in shown
    assert not (out / "adapter").exists()
    assert main(arguments(tiny, out, *steps, "--resume")) == 0
    assert "at step 1" in capsys.readouterr().out
    assert (out / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("key", [["--key", "secret"], ["--key=secret"]])
def test_the_model_card_has_the_command_without_its_key(
    key: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(tiny, tmp_path / "run", "--steps", "1", *key)
    monkeypatch.setattr(sys, "argv", ["loriner", *words])

    assert main(words) == 0
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "loriner train --base" in card
    assert "--key" in card
    assert "secret" not in card


def test_jobs_share_a_run_but_no_alias(
    tiny: Path,
    tmp_path: Path,
    write_rows: WriteRows,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = write_rows([chat(f"{i}?", f"{i}!") for i in range(8)])
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(
        f'base = "{tiny}"\ndevice = "cpu"\nsteps = 3\nsamples = 0\nbatch = 2\n'
        f'[[jobs]]\nname = "a"\ndata = "{rows}"\nrank = 2\n'
        f'[[jobs]]\nname = "acme/b"\ndata = "{PIRATE}"\nrank = 4\nsteps = 5\n'
    )

    assert main(["train", "--jobs", str(jobs), "--store", "s", "--promote", "acme/prod"]) == 2
    assert "two jobs would promote acme/prod" in capsys.readouterr().err
    assert main(["train", "--jobs", str(jobs)]) == 0
    assert len(metrics(tmp_path / "runs" / "a")) == 3
    assert len(metrics(tmp_path / "runs" / "acme--b")) == 5
    assert (tmp_path / "runs" / "acme--b" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--data", "none.jsonl"], 1, "none.jsonl: No such file"),
        (["--base", "none"], 1, "No such folder"),
        (["--rank", "0"], 2, "rank must be at least 1"),
        (["--publish", "http://x", "--store", "y"], 2, "publish and store exclude each other"),
        (["--promote", "prod"], 2, "promote needs publish or store"),
        (["--publish", "http://127.0.0.1:9"], 1, "no server answers at http://127.0.0.1:9"),
        (["--publish", "nowhere"], 2, "'nowhere' is not an http:// or https:// address"),
        (["--publish", "http://x", "--canaries", "0"], 2, "need canaries of at least 1"),
        (["--store", "y", "--promote", "prod"], 2, "promote needs eval_data or eval_split"),
        (["--resume"], 1, "there is no checkpoint"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    more: list[str],
    status: int,
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments(tiny, tmp_path / "run", "--steps", "1", *more)) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["train"], ["adapters", "add"]])
def test_help_tells_the_tolerances_that_hold(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    told = " ".join(capsys.readouterr().out.split())

    for dtype, limit in TOLERANCES.items():
        assert f"{limit:g} for one trained in {dtype}" in told


def test_bad_rows_stop_a_run_with_their_lines(
    tiny: Path, tmp_path: Path, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows([chat("q", "a"), {"messages": 3}, "{"])
    assert main(arguments(tiny, tmp_path / "run", "--data", str(path))) == 1

    error = capsys.readouterr().err
    assert "2 of 3 rows are bad, more than max_bad_share 0.01 allows" in error
    assert "line 2: `messages` must be a list" in error
    assert "line 3: no JSON" in error
