"""Damaged files are quarantined, failing disks are clear errors; the other adapters serve on."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loriner.adapters import intake
from loriner.adapters.store import Store
from loriner.errors import (
    AdapterQuarantinedError,
    AdapterStoreError,
)
from tests.adapters.samples import (
    BASE,
    TINY,
    Make,
    leftovers,
    stored,
)

WEIGHTS = "adapter_model.safetensors"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a weight": lambda folder: flip(folder / WEIGHTS, -5),
    "the header": lambda folder: flip(folder / WEIGHTS, 40),
    "the header's length": lambda folder: flip(folder / WEIGHTS, 1),
    "the scaling": lambda folder: flip(
        folder / "adapter_config.json",
        (folder / "adapter_config.json").read_text().index('"lora_alpha": ') + 14,
    ),
    "the whole config": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "a cut": lambda folder: os.truncate(folder / WEIGHTS, 100),
    "a lost file": lambda folder: (folder / WEIGHTS).unlink(),
    "a lost folder": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_quarantined_and_the_others_serve(
    tmp_path: Path, make: Make, damage: str
) -> None:
    with Store(tmp_path / "store", TINY, BASE) as store:
        bad = store.publish(make(1), "bad").generation
        good = store.publish(make(2), "good").generation
        DAMAGES[damage](store.path(bad))
        for _ in range(2):
            with pytest.raises(AdapterQuarantinedError):
                store.load(bad)
        assert stored(store) == {good}
        for call in (store.resolve, store.acquire, lambda name: store.set_alias("other", name)):
            with pytest.raises(AdapterQuarantinedError):
                call("bad")
        assert [record.name for record in store.list()] == ["default/good"]
        assert store.get("bad").state == "quarantined"
        assert store.load(good).generation == good
    with Store(tmp_path / "store", TINY, BASE) as store:
        with pytest.raises(AdapterQuarantinedError):
            store.resolve("bad")
        report = store.publish(make(1), "bad")
        assert (report.generation, report.existed) == (bad, False)
        assert store.load(store.resolve("bad").generation).generation == bad
    aside = list((tmp_path / "store" / "quarantine").iterdir())
    assert len(aside) == (0 if damage == "a lost folder" else 1)


def test_a_passing_read_fault_quarantines_nothing(
    store: Store, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = store.publish(make(1), "a").generation

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("loriner.adapters.formats.load", fail)
        with pytest.raises(AdapterStoreError, match="Too many open files"):
            store.load(generation)
    assert store.load(generation).generation == generation


class FullDisk:
    """Lets `budget` calls pass; the next one, or all that follow, fail as on a full disk."""

    def __init__(self, budget: int, stays_full: bool) -> None:
        self.left = budget
        self.stays_full = stays_full

    def __call__(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == -1 or (self.left < 0 and self.stays_full):
                raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")
            return call(*args, **options)

        return limited


@pytest.mark.parametrize("stays_full", [False, True])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, stays_full: bool
) -> None:
    folder = make(2)
    with Store(tmp_path / "store", TINY, BASE) as store:
        store.publish(make(1), "a")
        before = store.resolve("a")
        for budget in range(100):
            disk = FullDisk(budget, stays_full)
            with monkeypatch.context() as patch:
                for name in ("fsync", "rename", "mkdir"):
                    patch.setattr(os, name, disk(getattr(os, name)))
                patch.setattr(intake, "_copy", disk(intake._copy))
                try:
                    store.publish(folder, "a")
                    break
                except AdapterStoreError as error:
                    assert str(error) == "The adapter store failed: No space left on device."
            assert store.resolve("a") == before and leftovers(store) == []
            if (
                stays_full
            ):  # what could not even be taken back has no row, and goes at the next start
                Store(tmp_path / "store", TINY, BASE).close()
            assert stored(store) == {before.generation}
        assert 7 < budget < 99
        assert store.load(store.resolve("a").generation).generation != before.generation


class FullCatalogue(sqlite3.Connection):
    """A connection that cannot commit."""

    is_full = False

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if sql == "COMMIT" and FullCatalogue.is_full:
            raise sqlite3.OperationalError("database or disk is full")
        return super().execute(sql, *values)


def test_a_catalogue_that_cannot_commit_leaves_nothing(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3,
        "connect",
        lambda *args, **options: connect(*args, factory=FullCatalogue, **options),
    )
    with Store(tmp_path / "store", TINY, BASE) as store:
        old = store.publish(make(1), "a").generation
        monkeypatch.setattr(FullCatalogue, "is_full", True)
        for call in (
            lambda: store.publish(make(2), "a"),
            lambda: store.publish(make(2), "b"),
            lambda: store.set_alias("b", "a"),
            lambda: store.set_pinned("a", True),
            lambda: store.delete("a"),
        ):
            with pytest.raises(AdapterStoreError, match="database or disk is full"):
                call()
        monkeypatch.setattr(FullCatalogue, "is_full", False)
        assert stored(store) == {old}
        assert [record.generation for record in store.list()] == [old]
        assert not store.resolve("a").pinned
        assert store.publish(make(2), "a").generation != old


def test_a_store_of_a_newer_version_is_not_touched(tmp_path: Path) -> None:
    Store(tmp_path, TINY, BASE).close()
    connection = sqlite3.connect(tmp_path / "catalogue.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(AdapterStoreError, match="newer version"):
        Store(tmp_path, TINY, BASE)


def test_a_file_that_is_no_catalogue_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "catalogue.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(AdapterStoreError, match="catalogue failed"):
        Store(tmp_path, TINY, BASE)


def test_staging_is_gone_afterwards(store: Store) -> None:
    with store.staging() as folder:
        (folder / "x").write_bytes(b"x")
        assert folder.is_relative_to(store.root)
    assert not folder.exists()
