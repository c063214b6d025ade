"""Patterns match exactly as `re` does, or are refused; and never take long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loriner.adapters.patterns import UnsafePatternError, compile_pattern
from tests.adapters.samples import TINY

NAMES = [*TINY, "model.layers.13.self_attn.q_proj", "layersX3.mlp", "", "."]


@pytest.mark.parametrize(
    "source",
    [
        "q_proj",
        "layers.1.mlp.down_proj",
        "^model.layers.0.self_attn.q_proj",
        r".*\.q_proj$",
        r"model\.layers\.(0|2)\..*(q|k)_proj",
        r".*layers\.[0-9]+\.mlp.*",
        r"(?:.*?(?:self_attn|mlp).*?(?:k_proj|q_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:down_proj|fc1)))",
        "[^.]*",
        "lm.head",
        "(lm_)?head",
        ".{7}",
        "layers.1.?.mlp.*",
        r"model.layers.\d{1,2}.\w+.[a-z_]*",
        "|q_proj",
    ],
)
def test_real_configs_match_as_re_does(source: str) -> None:
    pattern = compile_pattern(source)
    for name in NAMES:
        assert pattern.matches_whole(name) == bool(re.fullmatch(source, name)), name
        assert pattern.matches_tail(name) == bool(re.match(rf"(.*\.)?({source})$", name)), name


@pytest.mark.parametrize(
    "source",
    [
        "(a+)+b",
        "(a|b)*",
        "(a?){9}",
        "(?=a)",
        "(?<!a)b",
        "(?i)a",
        "(?P<x>a)",
        r"(a)\1",
        r"\Z",
        r"\x41",
        "a**",
        "a++",
        "a{99}",
        "a{3,1}",
        "a{x}",
        "[z-a]",
        "[",
        "[]",
        "[[a]]",
        "(",
        ")",
        "*",
        "a\\",
        "[^||]",
        "[a&&b]",
        "[+--]",
        "é",
        "",
        "(" * 9 + "a" + ")" * 9,
        "a" * 1025,
    ],
)
def test_what_is_unsafe_or_malformed_is_refused(source: str) -> None:
    with pytest.raises(UnsafePatternError):
        compile_pattern(source)


def test_the_worst_pattern_is_fast() -> None:
    pattern = compile_pattern(".*a" * 341)
    start = time.process_time()
    for _ in range(1000):
        assert not pattern.matches_whole("a" * 60)
    assert time.process_time() - start < 1.0


CHARS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a.]", "[0-9_]", "_", "1"])
ITEMS = st.builds(str.__add__, CHARS, st.sampled_from(["", "", "*", "+", "?", "*?", "{2}", "{1,}"]))
SOURCES = st.recursive(
    st.lists(ITEMS | st.sampled_from(["^", "$", r"\b"]), min_size=1, max_size=5).map("".join),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda i: f"({'|'.join(i)})")
        | st.tuples(inner, inner).map("".join)
        | inner.map(lambda i: f"(?:{i})?")
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(source=SOURCES, name=st.text(alphabet="ab1_.", max_size=12))
def test_any_accepted_pattern_agrees_with_re(source: str, name: str) -> None:
    pattern = compile_pattern(source)
    assert pattern.matches_whole(name) == bool(re.fullmatch(source, name))
    assert pattern.matches_tail(name) == bool(re.match(rf"(.*\.)?({source})$", name))


@settings(max_examples=300)
@given(st.text(alphabet="ab.\\dw[]()|*+?{}1,^$-:", max_size=14))
def test_random_text_is_refused_or_agrees_with_re(source: str) -> None:
    try:
        pattern = compile_pattern(source)
    except UnsafePatternError:
        return
    for name in ("a.b", "aab1", "", "ab.a.b"):
        assert pattern.matches_whole(name) == bool(re.fullmatch(source, name))
