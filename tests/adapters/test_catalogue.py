"""The catalogue: durable when it says so, atomic, and readable while it is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loriner.adapters.catalogue import Catalogue, Generation

DIGESTS = [f"{i:x}" * 64 for i in range(10)]


def generation(digest: str, base: str | None = None) -> Generation:
    return Generation(digest, "ready", "b" * 64, base, (2, 8), ("q_proj",), 100, 7)


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    catalogue = Catalogue(tmp_path / "catalogue.sqlite")
    yield catalogue
    catalogue.close()


def test_a_commit_is_on_the_disk_when_it_returns(catalogue: Catalogue) -> None:
    writer = catalogue._writer
    assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert writer.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_rows_come_back_as_they_went_in(catalogue: Catalogue) -> None:
    with catalogue.transaction():
        catalogue.put_generation(generation(DIGESTS[1]))
        catalogue.point("acme/a", DIGESTS[1], "acme/b", "upload", 123)
    entry = catalogue.find("acme/a")
    assert entry is not None and entry.generation == generation(DIGESTS[1])
    assert (entry.alias_of, entry.source, entry.created_at) == ("acme/b", "upload", 123)
    assert catalogue.is_in_tenant(DIGESTS[1], "acme")
    assert not catalogue.is_in_tenant(DIGESTS[1], "acm")


def test_a_failed_transaction_leaves_no_trace(catalogue: Catalogue) -> None:
    with pytest.raises(KeyError), catalogue.transaction():
        catalogue.put_generation(generation(DIGESTS[1]))
        raise KeyError
    assert catalogue.states() == {}


def test_readers_see_a_change_only_when_it_is_committed(catalogue: Catalogue) -> None:
    with catalogue.transaction():
        catalogue.put_generation(generation(DIGESTS[1]))
        assert catalogue.states() == {}
    assert catalogue.states() == {DIGESTS[1]: "ready"}


def test_a_name_cannot_point_at_what_is_not_there(catalogue: Catalogue) -> None:
    with pytest.raises(Exception, match="FOREIGN KEY"), catalogue.transaction():
        catalogue.point("a/a", DIGESTS[1], None, "upload", 1)


def test_a_referenced_generation_cannot_be_deleted(catalogue: Catalogue) -> None:
    with catalogue.transaction():
        catalogue.put_generation(generation(DIGESTS[1]))
        catalogue.point("a/a", DIGESTS[1], None, "upload", 1)
    with pytest.raises(Exception, match="FOREIGN KEY"), catalogue.transaction():
        catalogue.delete_generation(DIGESTS[1])
    with catalogue.transaction():
        catalogue.delete_name("a/a")
    assert catalogue.unreferenced() == [DIGESTS[1]]


def test_a_prefix_finds_generations_of_its_own_name_only(catalogue: Catalogue) -> None:
    with catalogue.transaction():
        for digest in DIGESTS[1:4]:
            catalogue.put_generation(generation(digest))
            catalogue.point("a/a", digest, None, "upload", 1)
        catalogue.put_generation(generation(DIGESTS[5]))
        catalogue.point("a/b", DIGESTS[5], None, "upload", 1)
    found = catalogue.find_generations("a/a", "2" * 12)
    assert [entry.generation.digest for entry in found] == [DIGESTS[2]]
    assert catalogue.find_generations("a/a", DIGESTS[5][:12]) == []


def test_what_names_its_base_is_not_forgotten(catalogue: Catalogue) -> None:
    for base in (None, "c" * 64, None):
        with catalogue.transaction():
            catalogue.put_generation(generation(DIGESTS[1], base))
    kept = catalogue.generation(DIGESTS[1])
    assert kept is not None and kept.base_digest == "c" * 64
