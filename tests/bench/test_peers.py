"""Workers: what they are given, and that one that cannot run stops nothing."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import pytest

from loriner.bench import add_commands, machine, peers, worker
from loriner.bench.adapters import linear_shapes, write_adapters
from loriner.bench.cpu import measure_engine

CONFIG = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}
MODULES = {
    "self_attn.q_proj": (48, 48),
    "self_attn.k_proj": (16, 48),
    "mlp.down_proj": (48, 64),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def engine_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> peers.Engine:
    monkeypatch.setattr(worker, "HERE", tmp_path)
    (tmp_path / "worker.py").write_text(source)
    return peers.Engine("w", "worker", "worker.py", {"num_adapters": 1})


ARGS = argparse.Namespace(peer_venv=Path("unused"), new_tokens=3, settle=0.0)
COMMON = {"adapters": ["a", "b"], "threads": 2}


def test_the_command_is_registered_and_carries_its_function() -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    args = parser.parse_args(["bench", "cpu", "--only", "llama.cpp", "serve"])

    assert args.only == ["llama.cpp", "serve"]
    assert callable(args.run)


def test_a_worker_gets_its_share_of_the_job_and_the_thread_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(
        tmp_path,
        monkeypatch,
        "import json, os, sys\n"
        "job = json.load(open(sys.argv[1]))\n"
        "assert job['adapters'] == ['a'] and os.environ['OMP_NUM_THREADS'] == '2'\n"
        "runs = [{'start': 0.0, 'prefill_s': 1.0, 'decode_s': 2.0}]\n"
        "json.dump([{'rows': 1, 'adapters': 1, 'runs': runs}], open(sys.argv[2], 'w'))\n",
    )
    (case,) = measure_engine(engine, ARGS, COMMON)

    assert case.engine == "worker"
    assert case.tokens_per_s == 1.0


def test_a_worker_that_fails_is_missing_with_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tmp_path, monkeypatch, "raise SystemExit('no such model')")

    with pytest.raises(worker.WorkerError, match="exit status 1: no such model"):
        measure_engine(engine, ARGS, COMMON)


def test_a_peer_whose_packages_are_here_runs_in_this_interpreter(tmp_path: Path) -> None:
    engine = peers.Engine("w", "worker", "worker.py", {}, modules=("json",))

    assert peers.interpreter(engine, tmp_path / "never made") == Path(sys.executable)
    assert not (tmp_path / "never made").exists()


def test_random_adapters_name_every_linear_and_differ(base: Path) -> None:
    from safetensors.numpy import load_file

    first, second = write_adapters(base, base / "out", 2)
    tensors = load_file(first / "adapter_model.safetensors")
    shapes = linear_shapes(CONFIG)

    assert len(tensors) == 2 * len(shapes) == 2 * 7 * CONFIG["num_hidden_layers"]
    for name, (num_out, num_in) in MODULES.items():
        key = f"base_model.model.model.layers.1.{name}"
        assert tensors[f"{key}.lora_A.weight"].shape == (8, num_in)
        assert tensors[f"{key}.lora_B.weight"].shape == (num_out, 8)
    others = load_file(second / "adapter_model.safetensors")
    assert all((tensors[key] != others[key]).any() for key in tensors)


def test_the_machine_is_described_and_memory_counts_descendants() -> None:
    described = machine.describe(2)

    assert {"cpu", "cores", "threads", "commit", "date", "torch"} <= described.keys()
    assert machine.resident_mib(os.getpid()) > 1


def test_pressure_is_the_share_of_the_time_between_two_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waited(total_us: int) -> None:
        line = f"some avg10=7.50 avg60=0.00 avg300=0.00 total={total_us}\n"
        (tmp_path / "new").write_text(line)
        (tmp_path / "new").rename(tmp_path / "cpu")

    monkeypatch.setattr(machine, "PRESSURE", tmp_path / "cpu")
    waited(0)
    with machine.PressureLog(period_s=0.005) as log:
        start = time.monotonic()
        time.sleep(0.05)
        waited(25_000)
        time.sleep(0.05)
        end = time.monotonic()

    assert 0.0 < log.share(start, end) <= 0.3  # 25 ms of 100 ms; of more on a busy machine
    assert log.share(end + 1, end + 2) == 0.0
    assert not machine.wait_until_quiet(limit_s=0)
    assert machine.wait_until_quiet(limit_s=0, busy_percent=8)
