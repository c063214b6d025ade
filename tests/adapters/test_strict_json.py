"""JSON from strangers: one object, read one way, at a bounded cost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loriner.adapters.strict_json import MAX_DEPTH, parse_object
from loriner.errors import InvalidAdapterError

LIMIT = 1 << 16


def test_a_plain_object_is_read_as_json_reads_it() -> None:
    assert parse_object(b'{"a": [1, 2.5, null, {"b": "\\u00e9"}]}', "x", LIMIT) == {
        "a": [1, 2.5, None, {"b": "é"}]
    }


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"1", "not a JSON object"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": 1} {}', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "`a` occurs twice"),
        (b'{"x": {"a": 1, "b": 2, "a": 1}}', "`a` occurs twice"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (json.dumps({"a": 1}).encode("utf-16"), "not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"[" * 20_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 20 + b"]" * 20 + b"}", "more than 8 levels"),
        (b'{"a": "' + b"x" * LIMIT + b'"}', "more than 65536 bytes"),
    ],
)
def test_anything_else_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidAdapterError, match=reason):
        parse_object(data, "the config", LIMIT)


def test_the_depth_limit_is_exact() -> None:
    deepest = b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH
    parse_object(deepest, "x", LIMIT)
    with pytest.raises(InvalidAdapterError, match="levels deep"):
        parse_object(b'{"a":' + deepest + b"}", "x", LIMIT)


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,0aeu\\ ', max_size=80).map(str.encode))
def test_random_bytes_give_an_object_or_a_refusal(data: bytes) -> None:
    try:
        assert isinstance(parse_object(data, "x", LIMIT), dict)
    except InvalidAdapterError as error:
        assert str(error).isprintable()
