"""Adapter names: what is one, what is not, and that nothing else gets through."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loriner.adapters.names import AdapterName, AdapterRef, is_digest, parse_name, parse_ref, show
from loriner.errors import AdapterNotFoundError, InvalidRequestError

DIGEST = "0123456789abcdef" * 4

BAD_NAMES = [
    "",
    "/",
    "a/",
    "/a",
    "a/b/c",
    "../a",
    "a/..",
    "a..b",
    ".a",
    "-a",
    "_a",
    "A",
    "a b",
    "a\n",
    "a\0",
    "a\\b",
    "a:b",
    "a@b",
    "é",
    "a" * 65,
    "a/" + "b" * 65,
    "%2e%2e/a",
    "a/%2e%2e",
    DIGEST,
    "tenant/" + DIGEST,
    "\ud800",
    "x" * 10_000_000,
]


def test_a_bare_name_belongs_to_the_default_tenant() -> None:
    assert parse_name("pirate") == AdapterName("default", "pirate")
    assert str(parse_name("pirate")) == "default/pirate"


@pytest.mark.parametrize("text", ["a", "acme/legal-v2", "0/0", "a.b_c-d/x.y", "z" * 64])
def test_plain_names_are_taken(text: str) -> None:
    assert str(parse_name(text)).endswith(text)


@pytest.mark.parametrize("text", BAD_NAMES)
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_name(text)
    assert caught.value.param == "name"
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", [*BAD_NAMES, "a@", "a@abc", f"a@{DIGEST}0", "a@" + "G" * 12])
def test_what_cannot_be_a_reference_looks_like_what_does_not_exist(text: str) -> None:
    with pytest.raises(AdapterNotFoundError) as caught:
        parse_ref(text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_a_reference_may_name_a_generation() -> None:
    name = AdapterName("acme", "legal")
    assert parse_ref("acme/legal") == AdapterRef(name)
    assert parse_ref(f"acme/legal@{DIGEST[:12]}") == AdapterRef(name, DIGEST[:12])
    assert str(parse_ref(f"acme/legal@{DIGEST}")) == f"acme/legal@{DIGEST}"


def test_a_digest_is_64_lower_case_hex_digits() -> None:
    assert is_digest(DIGEST)
    assert not any(map(is_digest, [DIGEST[1:], DIGEST + "0", DIGEST.upper(), DIGEST[:-1] + "\n"]))


@given(st.text(max_size=140) | st.from_regex(r"[a-z0-9._/@-]{0,140}", fullmatch=True))
def test_every_accepted_name_is_a_safe_path_and_round_trips(text: str) -> None:
    try:
        name = parse_name(text)
    except InvalidRequestError:
        return
    for part in (name.tenant, name.short):
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", part) and ".." not in part
    assert parse_name(str(name)) == name == parse_ref(str(name)).name


@given(st.text())
def test_shown_text_is_short_printable_ascii(text: str) -> None:
    shown = show(text)
    assert len(shown) <= 96 and shown.isascii() and shown.isprintable() and "`" not in shown
