"""Killed, or out of power, at any step: what was acknowledged stays, the rest is whole or gone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loriner.adapters import formats
from loriner.adapters.store import Store
from tests.adapters.samples import BASE, TINY, write_adapter

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT / 'server'}", "OMP_NUM_THREADS": "1"}

STORY = ["b published", "a moved", "c aliased", "old deleted", "c deleted"]


@pytest.mark.parametrize("fault", ["kill", "power"])
def test_a_crash_at_any_step_loses_nothing_acknowledged(tmp_path: Path, fault: str) -> None:
    folders = [write_adapter(tmp_path / f"adapter-{seed}", seed=seed) for seed in range(3)]
    script = Path(__file__).with_name("kill_points.py")
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), *map(str, folders), fault],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert run.returncode == 0, run.stderr
    outcomes = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(outcomes) > 60 and not outcomes[-1]["killed"]
    assert [outcome["told"] for outcome in outcomes[-1:]] == [STORY]
    assert {len(outcome["told"]) for outcome in outcomes} == set(range(len(STORY) + 1))
    one, two, three = (formats.load(folder, TINY).generation for folder in folders)
    for number, outcome in enumerate(outcomes, 1):
        assert_whole(outcome, one, two, three, f"killed before step {number}: {outcome}")


def assert_whole(outcome: dict[str, Any], one: str, two: str, three: str, where: str) -> None:
    """The state is that after the acknowledged changes, or after one more."""
    states: list[dict[str, str | None]] = [{"a": one, "b": None, "c": None, "old": three}]
    for name, now in (("b", two), ("a", two), ("c", three), ("old", None), ("c", None)):
        states.append({**states[-1], name: now})
    done = len(outcome["told"])
    assert outcome["told"] == STORY[:done], where
    assert outcome["names"] in states[done : done + 2], where
    assert outcome["strays"] == [] and outcome["uploads"] == 0, where
    assert outcome["quarantined"] == 0, where


PUBLISHER = """
import sys
from pathlib import Path
from loriner.adapters.store import Store
from tests.adapters.samples import BASE, TINY
root, prefix, *folders = sys.argv[1:]
with Store(Path(root), TINY, BASE) as store:
    print("open", flush=True)
    for round in range(4):
        for i, folder in enumerate(folders):
            generation = store.publish(Path(folder), f"{prefix}{i}").generation
            record = store.acquire(f"{prefix}{i}")
            assert record.generation == generation
            assert store.load(generation).generation == generation
            if round < 3:
                store.delete(f"{prefix}{i}")
            store.release(generation)
"""


def test_two_processes_share_one_store(tmp_path: Path) -> None:
    """Both publish, delete and load the same weights under names of their own."""
    folders = [str(write_adapter(tmp_path / f"adapter-{seed}", seed=seed)) for seed in range(3)]
    root = tmp_path / "store"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, str(root), prefix, *folders],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for prefix in "xy"
    ]
    for run in runs:
        _, errors = run.communicate(timeout=60)
        assert run.returncode == 0, errors
    with Store(root, TINY, BASE) as store:
        assert len(store.list()) == 6
        assert len({store.load(record.generation).generation for record in store.list()}) == 3
        assert len(list((root / "generations").iterdir())) == 3
