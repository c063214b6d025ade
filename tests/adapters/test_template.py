"""A chat template in an upload: found, bounded, part of the generation's digest, and kept."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from loriner.adapters.store import Store
from loriner.adapters.template import MAX_TEMPLATE_BYTES
from loriner.errors import AdapterNotFoundError, InvalidAdapterError
from tests.adapters.samples import BASE, TINY, Make, stored

OWN = "{{ messages[0].content }}!\n"
OF_BASE = "{{ messages }}"


def check(template: str) -> str | None:
    if "broken" in template:
        raise InvalidAdapterError(["it is broken"])
    return None if template == OF_BASE else template


@pytest.fixture
def checking(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store", TINY, BASE, check_template=check) as store:
        yield store


def brings(folder: Path, *, jinja: bytes | None = None, tokenizer: object = None) -> Path:
    if jinja is not None:
        (folder / "chat_template.jinja").write_bytes(jinja)
    if tokenizer is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_template_makes_another_generation_of_the_same_weights(
    checking: Store, make: Make
) -> None:
    plain = checking.publish(make(1), "plain").generation
    report = checking.publish(brings(make(1), jinja=OWN.encode()), "own")
    domain = b"loriner adapter with a chat template v1\n"

    assert report.generation == hashlib.sha256(domain + f"{plain}\n{OWN}".encode()).hexdigest()
    assert report.ignored == () and not report.existed
    assert checking.resolve("own").has_template and not checking.resolve("plain").has_template
    assert checking.template(report.generation) == OWN and checking.template(plain) is None
    assert {path.name for path in checking.path(report.generation).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "seal",
    }


def test_what_is_loaded_is_verified_with_its_template(checking: Store, make: Make) -> None:
    digest = checking.publish(brings(make(1), jinja=OWN.encode()), "own").generation
    loaded = checking.load(digest)
    assert (loaded.generation, loaded.template) == (digest, OWN)


def test_a_template_outlives_a_restart_and_goes_with_its_generation(
    tmp_path: Path, make: Make
) -> None:
    root = tmp_path / "store"
    with Store(root, TINY, BASE, check_template=check) as store:
        digest = store.publish(brings(make(1), jinja=OWN.encode()), "own").generation
        store.set_alias("prod", "own")
    with Store(root, TINY, BASE) as store:
        assert store.template(store.resolve("prod").generation) == OWN
        store.delete("own")
        assert store.template(digest) == OWN
        store.delete("prod")
        assert stored(store) == set()
        with pytest.raises(AdapterNotFoundError):
            store.template(digest)
        assert store._catalogue.template(digest) is None


@pytest.mark.parametrize(
    ("jinja", "tokenizer", "found", "ignored"),
    [
        (None, {"chat_template": OWN}, OWN, ()),
        (None, {"chat_template": None, "x": 1}, None, ("tokenizer_config.json",)),
        (None, {"x": 1}, None, ("tokenizer_config.json",)),
        (OWN, {"chat_template": "other"}, OWN, ("tokenizer_config.json",)),
        (OF_BASE, None, None, ("chat_template.jinja",)),
        ("  \n", None, None, ("chat_template.jinja",)),
    ],
)
def test_a_template_is_found_where_transformers_finds_it(
    checking: Store,
    make: Make,
    jinja: str | None,
    tokenizer: object,
    found: str | None,
    ignored: tuple[str, ...],
) -> None:
    text = None if jinja is None else jinja.encode()
    plain = checking.publish(make(1), "plain").generation
    report = checking.publish(brings(make(1), jinja=text, tokenizer=tokenizer), "a")

    assert checking.template(report.generation) == found
    assert (report.generation == plain) is (found is None)
    assert report.ignored == ignored


@pytest.mark.parametrize(
    ("jinja", "tokenizer", "reason"),
    [
        (b"x" * (MAX_TEMPLATE_BYTES + 1), None, "at most 65536"),
        (b"\xff", None, "not UTF-8"),
        (b"{{ broken", None, "it is broken"),
        (None, {"chat_template": [{"name": "default", "template": OWN}]}, "several templates"),
        (None, {"chat_template": "\ud800"}, "half a character"),
        (None, [], "not a JSON object"),
    ],
)
def test_a_bad_template_is_refused_with_the_reason(
    checking: Store, make: Make, jinja: bytes | None, tokenizer: object, reason: str
) -> None:
    with pytest.raises(InvalidAdapterError, match=reason):
        checking.publish(brings(make(1), jinja=jinja, tokenizer=tokenizer), "a")
    assert stored(checking) == set()


def test_a_store_that_cannot_check_takes_none(store: Store, make: Make) -> None:
    with pytest.raises(InvalidAdapterError, match="cannot be checked"):
        store.publish(brings(make(1), jinja=OWN.encode()), "a")


def test_a_store_of_the_version_before_keeps_its_digests(tmp_path: Path, make: Make) -> None:
    root = tmp_path / "store"
    with Store(root, TINY, BASE) as store:
        before = store.publish(make(1), "a").generation
    with sqlite3.connect(root / "catalogue.sqlite") as old:
        old.execute("DROP TABLE templates")
        old.execute("PRAGMA user_version = 1")
    old.close()
    with Store(root, TINY, BASE, check_template=check) as store:
        assert store.resolve("a").generation == before == store.load(before).generation
        assert store.publish(brings(make(2), jinja=OWN.encode()), "b").ignored == ()
        assert store.resolve("b").has_template
