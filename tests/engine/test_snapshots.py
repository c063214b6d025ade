"""What an engine tells of itself: everything that changed, and only that."""

from __future__ import annotations

from pathlib import Path

import pytest

from loriner.adapters.pool import SeatWeights
from loriner.engine.cpu_runner import CpuRunner
from loriner.engine.snapshots import Latest, Snapshots
from loriner.engine.stats import EngineStats, GenerationStats
from tests.engines import WatchedEngine, build_engine, engine_config
from tests.fakes import make_request
from tests.tiny import write_tiny_base


@pytest.fixture
def engine(tmp_path: Path) -> WatchedEngine:
    config = engine_config(write_tiny_base(tmp_path / "base"), max_seats=2)
    weights = {name: SeatWeights({}, None, 10) for name in "abc"}
    return build_engine(config, weights, CpuRunner(config))


def tiers(stats: EngineStats) -> dict[str, str]:
    return {entry.generation: entry.tier for entry in stats.generations}


def test_a_reader_follows_a_request_from_the_queue_to_a_seat(engine: WatchedEngine) -> None:
    snapshots, latest = Snapshots(engine), Latest()
    engine.submit(make_request(generation="a", max_tokens=3, ignore_eos=True))
    latest.learn(snapshots.take())
    (entry,) = latest.stats.generations
    assert (entry.generation, entry.num_waiting, entry.num_running) == ("a", 1, 0)
    while not engine.scheduler.running:
        engine.step()
    latest.learn(snapshots.take())
    (entry,) = latest.stats.generations
    assert (entry.tier, entry.num_waiting, entry.num_running, entry.num_loads) == ("gpu", 0, 1, 1)
    engine.run_all()
    latest.learn(snapshots.take())
    (entry,) = latest.stats.generations
    assert (entry.tier, entry.num_waiting, entry.num_running) == ("gpu", 0, 0)
    assert latest.stats.num_loads == 1 and latest.stats.num_output_tokens == 3


def test_nothing_is_told_twice(engine: WatchedEngine) -> None:
    snapshots, latest = Snapshots(engine), Latest()
    for name in "abc":
        engine.run_all([make_request(generation=name, request_id=name)])
    latest.learn(snapshots.take())
    assert snapshots.take().generations == ()
    assert tiers(latest.stats) == {"a": "host", "b": "gpu", "c": "gpu"}
    engine.registry.evict("a")
    told = snapshots.take()
    assert tiers(told) == {"a": "disk"}
    latest.learn(told)
    assert tiers(latest.stats) == {"b": "gpu", "c": "gpu"}


def test_a_pin_is_told_and_so_is_its_end(engine: WatchedEngine) -> None:
    snapshots, latest = Snapshots(engine), Latest()
    engine.run_all([make_request(generation="a")])
    for kept in ("a", ""):
        engine.keep(kept)
        latest.learn(snapshots.take())
        (entry,) = latest.stats.generations
        assert entry.pinned is bool(kept)


def test_a_snapshot_costs_what_changed_and_not_what_is_known(engine: WatchedEngine) -> None:
    class Unwalkable(dict[str, object]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            raise AssertionError("walked over all that is known")

        items = values = keys = __iter__  # type: ignore[assignment]

    snapshots = Snapshots(engine)
    engine.run_all([make_request(generation="a")])
    engine.registry._entries = Unwalkable(engine.registry._entries)  # type: ignore[assignment]
    assert tiers(snapshots.take()) == {"a": "gpu"}


def test_what_is_on_the_disk_with_nobody_waiting_is_not_kept() -> None:
    latest = Latest()
    for tier, num_waiting, expected in (("disk", 1, ["a"]), ("host", 0, ["a"]), ("disk", 0, [])):
        entry = GenerationStats("a", tier, False, 0, num_waiting, 0, 0, 0.0)
        latest.learn(EngineStats(generations=(entry,)))
        assert [e.generation for e in latest.stats.generations] == expected
