"""Tiers: loading beside the engine, failure, host budget, eviction."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest

from loriner.adapters.pool import Pool, SeatWeights
from loriner.adapters.registry import Readiness, Registry
from loriner.errors import AdapterTooLargeError


class Disk:
    """Loads on command: a generation comes when its gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.loads: list[str] = []
        self.sizes: dict[str, int] = {}
        self.broken: set[str] = set()
        self.wanted: set[str] = set()

    def __call__(self, generation: str) -> SeatWeights:
        self.gate.wait(5)
        self.loads.append(generation)
        if generation in self.broken:
            raise OSError("unreadable")
        return SeatWeights({}, None, self.sizes.get(generation, 10))


def make(disk: Disk, *, pool_bytes: int = 100, seats: int = 4, host_bytes: int = 100) -> Registry:
    registry = Registry(disk, Pool(pool_bytes, seats), host_bytes, lambda: None)
    registry.is_wanted = disk.wanted.__contains__
    return registry


def wait_for(registry: Registry, generation: str, wanted: Readiness) -> None:
    source = registry.loaders.source
    assert isinstance(source, Disk)
    source.wanted.add(generation)
    deadline = time.monotonic() + 5
    while (state := registry.want(generation)) is not wanted:
        assert time.monotonic() < deadline, state
        time.sleep(0.001)
        registry.poll()
    if wanted is Readiness.SEATED:
        source.wanted.discard(generation)


@pytest.fixture
def disk() -> Disk:
    return Disk()


def test_wanting_never_waits_and_loads_once(disk: Disk) -> None:
    with closing(make(disk)) as registry:
        disk.gate.clear()
        disk.wanted.add("a")
        for _ in range(3):
            assert registry.want("a") is Readiness.LOADING
        assert registry.tier("a") == "disk"
        disk.gate.set()
        wait_for(registry, "a", Readiness.SEATED)
        assert disk.loads == ["a"] and registry.tier("a") == "gpu"


def test_a_prefetched_generation_waits_on_the_host(disk: Disk) -> None:
    with closing(make(disk)) as registry:
        disk.wanted.add("a")
        registry.prefetch("a")
        deadline = time.monotonic() + 5
        while registry.tier("a") != "host":
            assert time.monotonic() < deadline
            registry.poll()
        assert registry.want("a") is Readiness.SEATED


def test_without_a_free_seat_it_stays_on_the_host(disk: Disk) -> None:
    with closing(make(disk, seats=1)) as registry:
        wait_for(registry, "a", Readiness.SEATED)
        registry.pool.acquire("a")
        wait_for(registry, "b", Readiness.NO_SEAT)
        registry.pool.release("a")
        assert registry.want("b") is Readiness.SEATED
        assert registry.tier("a") == "host"


def test_a_failure_is_told_and_the_next_one_tries_again(disk: Disk) -> None:
    with closing(make(disk)) as registry:
        disk.broken.add("a")
        wait_for(registry, "a", Readiness.FAILED)
        assert isinstance(registry.take_failure("a"), OSError)
        disk.broken.clear()
        wait_for(registry, "a", Readiness.SEATED)


def test_what_no_pool_could_hold_fails(disk: Disk) -> None:
    with closing(make(disk)) as registry:
        disk.sizes["big"] = 101
        wait_for(registry, "big", Readiness.FAILED)
        assert isinstance(registry.take_failure("big"), AdapterTooLargeError)


def test_the_host_tier_forgets_the_least_recently_used(disk: Disk) -> None:
    with closing(make(disk, seats=1, host_bytes=20)) as registry:
        for name in "abcd":
            wait_for(registry, name, Readiness.SEATED)
        assert registry.host_used_bytes <= 20
        assert registry.tier("d") == "gpu"
        assert registry.tier("a") == "disk"


def test_two_that_load_at_once_both_get_their_turn_on_a_small_host(disk: Disk) -> None:
    with closing(make(disk, host_bytes=10)) as registry:
        disk.gate.clear()
        disk.wanted |= {"a", "b"}
        registry.prefetch("a")
        registry.prefetch("b")
        disk.gate.set()
        wait_for(registry, "a", Readiness.SEATED)
        wait_for(registry, "b", Readiness.SEATED)
        assert disk.loads == ["a", "b"], "one pushed the other out before it was used"


def test_what_nobody_waits_for_any_more_is_not_loaded(disk: Disk) -> None:
    with closing(make(disk)) as registry:
        disk.gate.clear()
        disk.wanted |= {"a", "b", "c", "d"}
        for name in "abcd":
            registry.prefetch(name)
        disk.wanted -= {"b", "c"}
        disk.gate.set()
        wait_for(registry, "d", Readiness.SEATED)
        assert disk.loads == ["a", "d"]


def test_a_failure_that_nobody_waits_for_is_forgotten(disk: Disk) -> None:
    with closing(make(disk)) as registry:
        disk.broken.add("a")
        disk.wanted.add("a")
        registry.prefetch("a")
        disk.wanted.clear()
        deadline = time.monotonic() + 5
        while not disk.loads or registry.loaders.loading:
            assert time.monotonic() < deadline
            registry.poll()
        disk.broken.clear()
        wait_for(registry, "a", Readiness.SEATED)


def test_a_pinned_generation_takes_a_free_seat_by_itself(disk: Disk) -> None:
    with closing(make(disk)) as registry:
        registry.keep("a")
        deadline = time.monotonic() + 5
        while registry.tier("a") != "gpu":
            assert time.monotonic() < deadline
            registry.poll()


def test_evicting_takes_it_out_of_both_tiers_unless_it_runs(disk: Disk) -> None:
    with closing(make(disk)) as registry:
        wait_for(registry, "a", Readiness.SEATED)
        registry.pool.acquire("a")
        assert not registry.evict("a")
        registry.pool.release("a")
        assert registry.evict("a") and registry.tier("a") == "disk"
        assert registry.host_used_bytes == 0


def test_one_that_is_evicted_before_its_turn_to_load_is_forgotten(disk: Disk) -> None:
    with closing(make(disk)) as registry:
        disk.gate.clear()
        disk.wanted |= {"a", "b"}
        registry.prefetch("a")
        registry.prefetch("b")
        disk.wanted.remove("b")
        assert registry.evict("b")
        disk.gate.set()
        wait_for(registry, "a", Readiness.SEATED)
        assert disk.loads == ["a"] and registry.tier("b") == "disk"


def test_several_loaders_work_side_by_side(disk: Disk) -> None:
    barrier = threading.Barrier(3, timeout=5)

    def source(generation: str) -> SeatWeights:
        barrier.wait()
        return SeatWeights({}, None, 10)

    with closing(Registry(source, Pool(100, 4), 100, lambda: None, num_loaders=3)) as registry:
        for name in "abc":
            registry.prefetch(name)
        deadline = time.monotonic() + 5
        while any(registry.want(name) is not Readiness.SEATED for name in "abc"):
            assert time.monotonic() < deadline
            registry.poll()
        registry.check_integrity()


def test_no_second_load_starts_without_room_for_it_on_the_host(disk: Disk) -> None:
    registry = Registry(disk, Pool(100, 4), 25, lambda: None, num_loaders=3)
    disk.wanted |= set("abcd")
    registry.is_wanted = disk.wanted.__contains__
    with closing(registry):
        wait_for(registry, "a", Readiness.SEATED)
        disk.gate.clear()
        for name in "bcd":
            registry.prefetch(name)
        assert len(registry.loaders.loading) == 2
        disk.gate.set()
        for name in "bcd":
            wait_for(registry, name, Readiness.SEATED)


def test_thousands_of_generations_cost_no_more_than_a_few(disk: Disk) -> None:
    """Calls that run in each step don't walk what is known."""

    class Counting(dict[str, object]):
        walks = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            Counting.walks += 1
            return super().__iter__()

        items = values = keys = __iter__  # type: ignore[assignment]

    with closing(make(disk, host_bytes=200)) as registry:
        for i in range(50):
            wait_for(registry, str(i), Readiness.SEATED)
        registry._entries = Counting(registry._entries)  # type: ignore[assignment]
        for i in range(100):
            wait_for(registry, str(i), Readiness.SEATED)
            registry.host_used_bytes + registry.pool.used_bytes
            registry.take_changes()
        assert Counting.walks == 0
