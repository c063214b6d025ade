"""Seats on a device: what a step reads is its own adapter's, from its launch to its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loriner.adapters.adapter import Adapter, LoraWeight
from loriner.adapters.gpu_pool import DeviceSeats
from loriner.adapters.host import HostArena
from loriner.adapters.image import ImageLayout, SeatImage, pack_image
from loriner.adapters.memory import Weights
from loriner.adapters.pool import Pool
from loriner.adapters.registry import Readiness, Registry
from loriner.errors import AdapterTooLargeError, EngineFailedError
from tests.adapters.fake_device import Launch, Reader, expected, fake_seats, layout_of
from tests.adapters.samples import TINY

LAYOUT = ImageLayout(layout_of(TINY), page_bytes=256, chunk_bytes=512)
MODULES = [n for n in TINY if n.endswith(("q_proj", "v_proj", "down_proj"))]


def adapter(seed: int, rank: int | None = None) -> Adapter:
    """Ranks 1 to 4, on some of the modules."""
    random = torch.Generator().manual_seed(seed)
    rank = rank or 1 + seed % 4
    names = MODULES[seed % 3 :]
    return Adapter.of(
        {
            n: LoraWeight(
                torch.randn(rank, TINY[n][1], generator=random),
                torch.randn(TINY[n][0], rank, generator=random),
                None,
                1.0 + seed,
            )
            for n in names
        }
    )


def image(seed: int, rank: int | None = None) -> SeatImage:
    return pack_image(adapter(seed, rank), LAYOUT)


SIZE = image(0, 2).num_bytes
X = torch.randn(16, generator=torch.Generator().manual_seed(5))


class Gpu:
    """A pool on a fake device; `reads` checks a seat the way a kernel would see it."""

    def __init__(self, pool_bytes: int, max_seats: int = 4) -> None:
        seats, self.copies, self.memory = fake_seats(LAYOUT, pool_bytes, max_seats)
        self.seats: DeviceSeats = seats
        self.pool = Pool(seats, max_seats)

    def reads(self, seat_id: int, wanted: Adapter) -> bool:
        reader = Reader(self.memory, self.seats.table[seat_id], LAYOUT)
        for layer in range(3):
            names = [f"model.layers.{layer}.self_attn.{p}_proj" for p in "qkv"]
            outs = [TINY[name][0] for name in names]
            found = reader.linear(f"{layer}.qkv", X, outs)
            if not torch.allclose(found, expected(wanted, names, X, outs), rtol=1e-6):
                return False
        return True


def test_a_seat_is_ready_when_image_and_row_have_arrived() -> None:
    gpu = Gpu(2 * SIZE)
    gpu.pool.seat("a", image(0, 2))
    assert "a" in gpu.pool and not gpu.pool.is_ready("a")
    gpu.copies.run()
    assert gpu.pool.is_ready("a")
    assert gpu.reads(gpu.pool.seat_id("a"), adapter(0, 2))
    assert gpu.copies.num_copies == 2, "an image in one stretch is one copy, and its row another"
    gpu.pool.check_integrity()


def test_seat_ids_stay_and_are_reused() -> None:
    gpu = Gpu(8 * SIZE, max_seats=2)
    for name in "ab":
        gpu.pool.seat(name, image(0, 2))
    gpu.copies.run()
    assert {gpu.pool.seat_id("a"), gpu.pool.seat_id("b")} == {0, 1}
    freed = gpu.pool.seat_id("a")
    assert gpu.pool.seat("c", image(1, 2)) == ["a"]
    assert gpu.pool.seat_id("c") == freed
    gpu.pool.check_integrity()


def test_memory_is_overwritten_only_after_the_last_step_that_may_read_it() -> None:
    gpu = Gpu(SIZE)
    gpu.pool.seat("a", image(0, 2))
    gpu.copies.run()
    step = Launch()
    gpu.pool.note_launch(step)
    seat_id = gpu.pool.seat_id("a")
    gpu.pool.seat("b", image(3, 2))
    gpu.copies.run()
    assert not gpu.pool.is_ready("b")
    assert gpu.reads(seat_id, adapter(0, 2)), "the step still runs"
    step.done = True
    gpu.copies.run()
    assert gpu.pool.is_ready("b") and gpu.reads(gpu.pool.seat_id("b"), adapter(3, 2))


def test_a_free_seat_waits_for_no_step() -> None:
    gpu = Gpu(4 * SIZE)
    gpu.pool.note_launch(Launch())
    gpu.pool.seat("a", image(0, 2))
    gpu.copies.run()
    assert gpu.pool.is_ready("a")


def test_an_image_is_split_where_memory_is() -> None:
    gpu = Gpu(4 * SIZE, max_seats=8)
    for i in range(4):
        gpu.pool.seat(f"{i}", image(0, 2))
    gpu.copies.run()
    for victim in ("0", "2"):
        gpu.pool.evict(victim)
    big = image(3, 6)
    assert SIZE < big.num_bytes <= 2 * SIZE
    assert gpu.pool.has_room(big)
    gpu.pool.seat("big", big)
    gpu.copies.run()
    assert gpu.reads(gpu.pool.seat_id("big"), adapter(3, 6))
    for i in (1, 3):
        assert gpu.reads(gpu.pool.seat_id(f"{i}"), adapter(0, 2))
    gpu.pool.check_integrity()


def test_no_more_is_evicted_than_must_be() -> None:
    gpu = Gpu(3 * SIZE, max_seats=8)
    for name in "abc":
        gpu.pool.seat(name, image(0, 2))
    gpu.copies.run()
    gpu.pool.acquire("a")
    assert gpu.pool.seat("d", image(0, 2)) == ["b"]
    gpu.copies.run()
    gpu.pool.acquire("d")
    gpu.pool.acquire("c")
    assert not gpu.pool.can_seat(image(0, 1))


def test_a_copy_that_failed_is_told() -> None:
    gpu = Gpu(SIZE)
    gpu.copies.broken = True
    gpu.pool.seat("a", image(0, 2))
    gpu.copies.run()
    with pytest.raises(EngineFailedError):
        gpu.pool.is_ready("a")


class Poisoned(HostArena):
    """Freed buffers are overwritten at once, as the next load would."""

    def _free(self, allocation) -> None:  # type: ignore[no-untyped-def]
        for start, n in allocation.runs:
            self._data[start * self._page : (start + n) * self._page] = 0xEE
        super()._free(allocation)


class World:
    """Registry, pool, fake device and steps that end late, driven by hand."""

    def __init__(self, pool_bytes: int, seats: int, host_bytes: int, num_loaders: int = 2) -> None:
        self.gpu = Gpu(pool_bytes, seats)
        self.host = Poisoned(torch.zeros(host_bytes, dtype=torch.uint8), page_bytes=256)
        self.loads: list[str] = []
        self.waiting: list[str] = []
        self.woken = threading.Event()
        self.running: list[str] = []
        self.steps: list[tuple[Launch, dict[int, str]]] = []
        self.registry = Registry(
            self.load, self.gpu.pool, host_bytes, self.woken.set, num_loaders=num_loaders
        )
        self.registry.is_wanted = self.waiting.__contains__

    def load(self, generation: str) -> Weights:
        self.loads.append(generation)
        return pack_image(adapter(int(generation)), LAYOUT, self.host.allocate)

    def settle(self) -> None:
        """Wait for the loaders."""
        deadline = time.monotonic() + 5
        self.registry.poll()
        while self.registry.loaders.loading:
            assert time.monotonic() < deadline
            time.sleep(0.0002)
            self.registry.poll()

    def step(self) -> None:
        """Poll, admit who can run, launch."""
        self.registry.poll()
        for generation in list(self.waiting):
            if self.registry.want(generation) is Readiness.SEATED:
                self.waiting.remove(generation)
                self.gpu.pool.acquire(generation)
                self.running.append(generation)
        seats = {self.gpu.pool.seat_id(g): g for g in self.running}
        launch = Launch()
        self.steps.append((launch, seats))
        self.gpu.pool.note_launch(launch)
        self.check(seats)

    def end_step(self) -> None:
        launch, seats = self.steps.pop(0)
        self.check(seats)
        launch.done = True

    def check(self, seats: dict[int, str]) -> None:
        for seat_id, generation in seats.items():
            assert self.gpu.reads(seat_id, adapter(int(generation))), "a stranger's weights"

    def run_until_idle(self) -> None:
        for _ in range(200):
            if not self.waiting:
                return
            self.settle()
            self.step()
            self.gpu.copies.run()
            self.end_step()
            while self.running:
                self.gpu.pool.release(self.running.pop())
        raise AssertionError(f"{self.waiting} wait for ever")

    def close(self) -> None:
        self.registry.close()


@pytest.fixture
def world() -> Iterator[World]:
    world = World(2 * SIZE, 2, 3 * SIZE)
    yield world
    world.close()


def test_a_seat_on_its_way_is_loading_and_not_taken_away(world: World) -> None:
    world.waiting += ["1", "4", "7"]
    for generation in world.waiting:
        world.registry.prefetch(generation)
    world.settle()
    assert world.registry.want("1") is Readiness.LOADING
    assert world.registry.want("4") is Readiness.LOADING
    assert world.registry.want("7") is Readiness.NO_SEAT
    assert world.registry.tier("1") == "gpu"
    world.gpu.copies.run()
    world.registry.poll()
    assert world.registry.want("7") is Readiness.NO_SEAT, "1 has not had its turn yet"
    assert world.registry.want("1") is Readiness.SEATED
    world.registry.check_integrity()


def test_a_seat_that_nobody_could_take_is_given_up(world: World) -> None:
    world.waiting += ["1", "4"]
    for generation in world.waiting:
        world.registry.prefetch(generation)
    world.settle()
    for generation in world.waiting:
        world.registry.want(generation)
    world.gpu.copies.run()
    world.registry.poll()
    world.registry.poll()
    world.waiting.append("7")
    world.registry.prefetch("7")
    world.settle()
    assert world.registry.want("7") is Readiness.LOADING, "the others had their turn"
    world.registry.check_integrity()


def test_an_engine_that_sleeps_until_woken_serves_all_that_wait() -> None:
    world = World(SIZE, 1, SIZE)
    try:
        world.waiting += ["1", "4", "7"]
        for generation in world.waiting:
            world.registry.prefetch(generation)
        while world.waiting:
            assert world.woken.wait(5), f"{world.waiting} wait for ever"
            world.woken.clear()
            ran = True
            while ran:
                world.step()
                ran = bool(world.running)
                world.end_step()
                while world.running:
                    world.gpu.pool.release(world.running.pop())
            if world.gpu.copies.jobs:
                world.gpu.copies.run()
                world.woken.set()  # as the thread of the copies does
    finally:
        world.close()


def test_a_seat_whose_sequence_left_does_not_keep_a_sleeping_engine() -> None:
    world = World(SIZE, 1, 3 * SIZE)
    try:
        world.waiting += ["1", "4"]
        world.registry.prefetch("1")
        world.registry.prefetch("4")
        world.settle()
        assert world.registry.want("1") is Readiness.LOADING
        world.waiting.remove("1")
        world.gpu.copies.run()
        world.woken.clear()
        world.registry.poll()
        assert world.registry.want("4") is Readiness.NO_SEAT
        assert world.woken.is_set()
        world.registry.poll()
        assert world.registry.want("4") is Readiness.LOADING
    finally:
        world.close()


def test_host_copies_of_seated_ones_go_first_and_are_back_from_disk(world: World) -> None:
    for generation in ("1", "4", "7", "10"):
        world.waiting.append(generation)
        world.run_until_idle()
    assert world.registry.host_used_bytes <= world.registry.host_bytes
    world.registry.check_integrity()
    world.host.check_integrity()
    seated = [g for g in world.loads if world.registry.tier(g) == "gpu"]
    assert len(seated) == 2
    for generation in ("1", "4", "7", "10"):
        world.waiting.append(generation)
        world.run_until_idle()
    for generation in ("1", "4", "7", "10"):
        world.registry.evict(generation)
    assert world.registry.host_used_bytes == 0 and world.host._arena.num_free == 3 * SIZE // 256
    assert {world.registry.tier(g) for g in ("1", "4", "7", "10")} == {"disk"}
    world.registry.check_integrity()


def test_from_the_host_tier_nothing_is_read_again() -> None:
    world = World(2 * SIZE, 1, 100 * SIZE)
    try:
        for generation in ["1", "4", "7"] * 3:
            world.waiting.append(generation)
            world.run_until_idle()
        assert sorted(world.loads) == ["1", "4", "7"]
        assert world.gpu.pool.num_evictions == 8
    finally:
        world.close()


def test_what_is_larger_than_the_pool_is_refused_and_its_memory_given_back() -> None:
    world = World(1024, 1, 8 * SIZE)
    try:
        world.waiting.append("3")
        world.registry.prefetch("3")
        world.settle()
        assert world.registry.want("3") is Readiness.FAILED
        assert isinstance(world.registry.take_failure("3"), AdapterTooLargeError)
        assert world.host._arena.num_free == world.host._arena.num_pages
    finally:
        world.close()


def test_changes_are_told_once(world: World) -> None:
    for generation in ("1", "4", "7"):
        world.waiting.append(generation)
        world.run_until_idle()
    assert world.registry.take_changes() == {"1", "4", "7"}
    assert world.registry.take_changes() == set()
    world.registry.evict("7")
    assert world.registry.take_changes() == {"7"} and world.registry.tier("7") == "disk"


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["wait", "wait", "step", "step", "copy", "end", "finish", "load", "evict"]),
        st.integers(0, 11),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(ACTIONS, st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 3]))
def test_no_step_ever_reads_another_adapter(
    actions: list[tuple[str, int]], pool: int, host: int, num_loaders: int
) -> None:
    world = World(pool * SIZE + 2048, 3, host * SIZE, num_loaders)
    try:
        for action, n in actions:
            if action == "wait":
                world.waiting.append(str(n))
                world.registry.prefetch(str(n))
            elif action == "step" and len(world.steps) < 2:
                world.step()
            elif action == "copy":
                world.gpu.copies.run()
            elif action == "end" and world.steps:
                world.end_step()
            elif action == "finish" and world.running:
                world.gpu.pool.release(world.running.pop(n % len(world.running)))
            elif action == "load":
                world.settle()
            elif action == "evict":
                world.registry.evict(str(n))
            world.registry.check_integrity()
            world.host.check_integrity()
        while world.steps:
            world.end_step()
        world.gpu.copies.run()
        while world.running:
            world.gpu.pool.release(world.running.pop())
        world.run_until_idle()
        world.registry.check_integrity()
    finally:
        world.close()
