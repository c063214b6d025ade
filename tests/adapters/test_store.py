"""The store: what is published is found, held, aliased, rolled back, loaded; nothing else is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loriner.adapters.records import AdapterRecord
from loriner.adapters.store import Store
from loriner.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    AdapterStoreError,
    InvalidAdapterError,
    InvalidRequestError,
    LorinerError,
)
from tests.adapters.samples import (
    BASE,
    PEFT_FOLDERS,
    SHARED,
    SMOLLM2,
    TINY,
    Make,
    config,
    leftovers,
    module_table,
    stored,
    write_adapter,
)
from tests.adapters.test_names import BAD_NAMES

WEIGHTS = "adapter_model.safetensors"


def test_a_publish_is_reported_found_and_loaded(store: Store) -> None:
    report = store.publish(PEFT_FOLDERS / "patterns", "acme/legal", source="path")
    assert (report.name, report.existed) == ("acme/legal", False)
    assert report.ranks == (2, 3, 6) and len(report.targets) == 7
    assert (report.modules_matched, report.modules_total) == (21, 23)
    record = store.resolve("acme/legal")
    assert record == AdapterRecord(
        name="acme/legal",
        short_name="legal",
        generation=report.generation,
        ranks=report.ranks,
        targets=report.targets,
        num_bytes=report.num_bytes,
        pinned=False,
        created_at=report.created_at,
        alias_of=None,
        base_digest=None,
        source="path",
    )
    assert abs(record.created_at - time.time()) < 60
    adapter = store.load(report.generation)
    assert adapter.generation == report.generation and adapter.num_bytes == report.num_bytes
    for name in ("adapter_config.json", WEIGHTS):
        kept = store.path(report.generation) / name
        assert kept.read_bytes() == (PEFT_FOLDERS / "patterns" / name).read_bytes()
    assert leftovers(store) == []


def test_what_was_published_is_there_after_a_restart(tmp_path: Path, make: Make) -> None:
    with Store(tmp_path / "store", TINY, BASE) as store:
        report = store.publish(make(1), "a")
        store.set_alias("b", "a")
        store.set_pinned("b", True)
    with Store(tmp_path / "store", TINY, BASE) as store:
        assert [record.name for record in store.list()] == ["default/a", "default/b"]
        assert store.resolve("b").pinned and store.resolve("b").alias_of == "default/a"
        assert store.load(report.generation).generation == report.generation


def test_the_same_weights_are_stored_once(store: Store, make: Make) -> None:
    first = store.publish(make(1), "a")
    inode = (store.path(first.generation) / WEIGHTS).stat().st_ino
    second = store.publish(make(1), "acme/b")
    again = store.publish(make(1), "a")
    assert first.generation == second.generation == again.generation
    assert (first.existed, second.existed, again.existed) == (False, True, True)
    assert stored(store) == {first.generation}
    assert (store.path(first.generation) / WEIGHTS).stat().st_ino == inode
    assert len(store.history("a")) == 1
    store.delete("a")
    assert store.load(store.resolve("acme/b").generation).generation == first.generation


def test_a_second_publish_moves_the_name_and_keeps_the_past(store: Store, make: Make) -> None:
    old, new = (store.publish(make(seed), "a").generation for seed in (1, 2))
    assert store.resolve("a").generation == new
    assert [record.generation for record in store.history("a")] == [new, old]
    assert store.resolve(f"a@{old[:12]}").generation == old
    assert store.load(old).generation == old
    back = store.set_alias("a", f"a@{old[:16]}")
    assert back.generation == old and back.alias_of is None
    assert [record.generation for record in store.history("a")] == [old, new, old]


def test_only_the_latest_generations_are_kept(tmp_path: Path, make: Make) -> None:
    with Store(tmp_path / "store", TINY, BASE, max_history=2) as store:
        published = [store.publish(make(seed), "a").generation for seed in range(4)]
        assert stored(store) == set(published[2:])
        with pytest.raises(AdapterNotFoundError):
            store.resolve(f"a@{published[0]}")


def test_an_alias_stays_when_its_target_moves_or_goes(store: Store, make: Make) -> None:
    old = store.publish(make(1), "a").generation
    assert store.set_alias("prod", "a").alias_of == "default/a"
    store.publish(make(2), "a")
    assert store.resolve("prod").generation == old
    store.delete("a")
    assert store.load(store.resolve("prod").generation).generation == old
    assert stored(store) == {old}
    store.publish(make(3), "prod")
    assert store.resolve("prod").alias_of is None


def test_a_digest_is_reached_only_from_its_own_tenant(store: Store, make: Make) -> None:
    secret = store.publish(make(1), "acme/a").generation
    assert store.set_alias("acme/b", secret).generation == secret
    for target in (secret, "acme/a", f"acme/a@{secret}", f"a@{secret}", "f" * 64):
        with pytest.raises(AdapterNotFoundError) as caught:
            store.set_alias("evil/b", target)
        assert caught.value.param == "target"
    store.publish(make(2), "evil/a")
    with pytest.raises(AdapterNotFoundError):
        store.resolve(f"evil/a@{secret[:12]}")


def test_a_listing_is_ordered_and_by_tenant(store: Store, make: Make) -> None:
    for name in ("b", "acme/z", "a", "acme-2/x", "acme/a"):
        store.publish(make(1), name)
    assert [r.name for r in store.list("acme")] == ["acme/a", "acme/z"]
    assert [r.name for r in store.list()] == [
        "acme-2/x",
        "acme/a",
        "acme/z",
        "default/a",
        "default/b",
    ]


def test_compare_and_swap_guards_every_change(store: Store, make: Make) -> None:
    old = store.publish(make(1), "a", expected_generation="").generation
    new = store.publish(make(2), "a", expected_generation=old[:12]).generation
    changes: list[Callable[[str], Any]] = [
        lambda expected: store.publish(make(3), "a", expected_generation=expected),
        lambda expected: store.set_alias("a", f"a@{old}", expected_generation=expected),
        lambda expected: store.delete("a", expected_generation=expected),
    ]
    for change in changes:
        for expected in ("", old, old[:12], "f" * 64):
            with pytest.raises(AdapterConflictError):
                change(expected)
        with pytest.raises(InvalidRequestError):
            change("abc")
    assert store.resolve("a").generation == new and len(stored(store)) == 2
    with pytest.raises(AdapterConflictError, match="does not exist yet"):
        store.publish(make(3), "fresh", expected_generation=new)
    assert store.delete("a", expected_generation=new).generation == new


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_method_takes_a_bad_name(store: Store, make: Make, name: str) -> None:
    store.publish(make(1), "good")
    lookups: list[Callable[[], Any]] = [
        lambda: store.resolve(name),
        lambda: store.acquire(name),
        lambda: store.get(name),
        lambda: store.history(name),
        lambda: store.delete(name),
        lambda: store.set_pinned(name, True),
        lambda: store.set_alias("good", name),
        lambda: store.path(name),
        lambda: store.load(name),
    ]
    for lookup in lookups:
        with pytest.raises(AdapterNotFoundError):
            lookup()
    for create in (lambda: store.publish(make(1), name), lambda: store.set_alias(name, "good")):
        with pytest.raises(InvalidRequestError):
            create()
    assert [record.name for record in store.list()] == ["default/good"]
    assert {p.name for p in store.root.iterdir()} == {
        *("catalogue.sqlite", "catalogue.sqlite-shm", "catalogue.sqlite-wal", "lock"),
        *("generations", "incoming", "quarantine"),
    }


def test_absent_foreign_and_deleted_look_the_same(store: Store, make: Make) -> None:
    store.publish(make(1), "acme/a")
    store.publish(make(1), "gone")
    store.delete("gone")
    messages = set()
    for name in ("other", "gone", "evil/a"):
        with pytest.raises(AdapterNotFoundError) as caught:
            store.resolve(name)
        messages.add(str(caught.value).replace(str(caught.value.name), "NAME"))
    assert len(messages) == 1


def test_a_refused_upload_leaves_nothing(store: Store, make: Make, tmp_path: Path) -> None:
    good = store.publish(make(1), "a").generation
    bad = write_adapter(tmp_path / "bad", keys=config(use_dora=True, r=5))
    with pytest.raises(InvalidAdapterError) as caught:
        store.publish(bad, "a")
    assert len(caught.value.reasons) == 2
    (bad / "evil.pkl").write_bytes(b"x")
    for folder in (bad, tmp_path / "nowhere", make(1) / WEIGHTS):
        with pytest.raises(InvalidAdapterError):
            store.publish(folder, "b")
    assert stored(store) == {good} and leftovers(store) == []
    assert store.resolve("a").generation == good


def test_an_adapter_of_another_base_is_refused(store: Store, make: Make) -> None:
    folder = make(1)
    (folder / "loriner.json").write_text(json.dumps({"base_digest": "c" * 64}))
    with pytest.raises(InvalidAdapterError, match="trained on another base"):
        store.publish(folder, "a")
    (folder / "loriner.json").write_text(json.dumps({"base_digest": BASE}))
    report = store.publish(folder, "a")
    assert store.resolve("a").base_digest == store.load(report.generation).base_digest == BASE


def test_what_names_its_base_later_is_remembered(store: Store, make: Make) -> None:
    generation = store.publish(make(1), "a").generation
    (make(1) / "loriner.json").write_text(json.dumps({"base_digest": BASE}))
    assert store.publish(make(1), "b").existed
    assert store.resolve("a").base_digest == store.load(generation).base_digest == BASE


def test_a_store_opened_for_another_base_serves_nothing_of_the_first(
    tmp_path: Path, make: Make
) -> None:
    with Store(tmp_path / "store", TINY, BASE) as store:
        generation = store.publish(make(1), "a").generation
    with Store(tmp_path / "store", module_table(24, 48, 12, 3, 48), "c" * 64) as store:
        assert store.list() == []
        assert store.get("a").state == "other base"
        for call in (lambda: store.resolve("a"), lambda: store.load(generation)):
            with pytest.raises(InvalidAdapterError, match="for another base"):
                call()
    with Store(tmp_path / "store", TINY, BASE) as store:
        assert store.load(store.resolve("a").generation).ranks == (2,)


def test_a_deleted_generation_lives_until_it_is_released(store: Store, make: Make) -> None:
    generation = store.publish(make(1), "a").generation
    assert store.acquire("a").generation == store.acquire("a").generation == generation
    store.delete("a")
    with pytest.raises(AdapterNotFoundError):
        store.resolve("a")
    assert store.load(generation).generation == generation
    store.release(generation)
    assert store.load(generation).generation == generation
    store.release(generation)
    assert stored(store) == set() and leftovers(store) == []
    with pytest.raises(AdapterNotFoundError):
        store.load(generation)


def test_another_store_on_the_same_root_respects_a_hold(tmp_path: Path, make: Make) -> None:
    with (
        Store(tmp_path / "store", TINY, BASE) as server,
        Store(tmp_path / "store", TINY, BASE) as tool,
    ):
        generation = server.publish(make(1), "a").generation
        assert tool.acquire("a").generation == generation
        server.delete("a")
        assert tool.load(generation).generation == generation
        tool.release(generation)
        assert stored(server) == set()


def test_closing_gives_up_the_holds(tmp_path: Path, make: Make) -> None:
    with Store(tmp_path / "store", TINY, BASE) as other:
        with Store(tmp_path / "store", TINY, BASE) as store:
            generation = store.publish(make(1), "a").generation
            store.acquire("a")
            other.delete("a")
            assert stored(other) == {generation}
        store.release(generation)
        other.publish(make(2), "b")
        assert generation not in stored(other)


def test_a_generation_published_again_while_its_last_holder_leaves_stays(
    store: Store, make: Make
) -> None:
    generation = store.publish(make(1), "a").generation
    store.acquire("a")
    store.delete("a")
    assert store.publish(make(1), "b").existed
    store.release(generation)
    assert store.load(store.resolve("b").generation).generation == generation


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared SmolLM2 adapters are not here")
def test_a_five_megabyte_publish_is_fast(tmp_path: Path) -> None:
    with Store(tmp_path / "store", SMOLLM2, BASE) as store:
        start = time.process_time()
        report = store.publish(SHARED / "trained-pirate", "pirate")
        assert time.process_time() - start < 0.4
        assert report.modules_matched == 210
        start = time.process_time()
        store.load(report.generation)
        assert time.process_time() - start < 0.4


def test_every_error_is_of_our_tree() -> None:
    assert issubclass(AdapterStoreError, LorinerError)
