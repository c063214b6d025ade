"""Many threads, one store: every reader sees a whole state, and every swap has one winner."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loriner.adapters.store import Store
from loriner.errors import AdapterConflictError, AdapterNotFoundError
from tests.adapters.samples import BASE, TINY, Make, leftovers, stored


def run_all(*calls: Callable[[], Any]) -> list[BaseException]:
    """Run the calls at once; returns what they raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            call()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return errors


def test_eight_threads_publish_one_name(store: Store, make: Make) -> None:
    folders = [make(seed) for seed in range(8)]
    errors = run_all(*(lambda f=folder: store.publish(f, "a") for folder in folders))
    assert errors == []
    history = store.history("a")
    assert len({record.generation for record in history}) == len(history) == 8
    assert store.resolve("a").generation == history[0].generation
    for record in history:
        store.load(record.generation)


def test_eight_threads_publish_the_same_weights(store: Store, make: Make) -> None:
    folder = make(1)
    reports = []
    publish: Callable[[int], Any] = lambda i: reports.append(store.publish(folder, f"a{i}"))  # noqa: E731
    assert run_all(*(lambda i=i: publish(i) for i in range(8))) == []
    assert len(stored(store)) == 1
    assert sorted(report.existed for report in reports) == [False] + [True] * 7


def test_of_eight_swaps_one_wins(store: Store, make: Make) -> None:
    current = store.publish(make(0), "a").generation
    for round in range(3):
        folders = [make(10 * round + i + 1) for i in range(8)]
        errors = run_all(
            *(
                lambda f=folder, e=current: store.publish(f, "a", expected_generation=e)
                for folder in folders
            )
        )
        assert len(errors) == 7
        assert all(isinstance(error, AdapterConflictError) for error in errors)
        current = store.resolve("a").generation


def test_an_alias_moves_at_once_for_every_reader(store: Store, make: Make) -> None:
    generations = [store.publish(make(i), name).generation for i, name in enumerate("ab")]
    store.set_alias("prod", "a")
    done = threading.Event()
    seen: set[str] = set()

    def move() -> None:
        for i in range(60):
            store.set_alias("prod", "ba"[i % 2])
        done.set()

    def read() -> None:
        while not done.is_set():
            record = store.acquire("prod")
            seen.add(record.generation)
            assert store.load(record.generation).generation == record.generation
            store.release(record.generation)

    assert run_all(move, read, read, read) == []
    assert seen <= set(generations)


def test_a_storm_of_publishes_and_deletes_breaks_nothing(store: Store, make: Make) -> None:
    folders = [make(seed) for seed in range(4)]

    def storm(worker: int) -> None:
        for i in range(25):
            name = f"n{(worker + i) % 3}"
            try:
                if (worker + i) % 4 == 0:
                    store.delete(name)
                elif i % 4 == 1:
                    store.publish(folders[(worker * i) % 4], name)
                else:
                    record = store.acquire(name)
                    assert store.load(record.generation).generation == record.generation
                    store.release(record.generation)
            except AdapterNotFoundError:
                pass

    assert run_all(*(lambda w=worker: storm(w) for worker in range(6))) == []
    alive = {entry.generation for r in store.list() for entry in store.history(r.name)}
    assert stored(store) == alive
    for record in store.list():
        store.delete(record.name)
    assert stored(store) == set() and leftovers(store) == []


def test_an_acquire_waits_while_another_process_clears_up(tmp_path: Path, make: Make) -> None:
    with (
        Store(tmp_path / "store", TINY, BASE) as store,
        Store(tmp_path / "store", TINY, BASE) as other,
    ):
        generation = store.publish(make(1), "a").generation
        disk = other._generations.disk
        assert disk.own_generation(generation)
        held = threading.Thread(target=store.acquire, args=("a",))
        held.start()
        held.join(0.05)
        assert held.is_alive()
        disk.let_go(generation)
        held.join(5)
        assert not held.is_alive() and not disk.own_generation(generation)
