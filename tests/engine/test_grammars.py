"""Compiling what callers send: bounded, beside the loop, refused with the reason."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from loriner.engine.grammars import MAX_CHARS, Constraint, Grammars, Kind, bridge
from loriner.errors import InvalidRequestError
from tests.grammars import admits, compiled, next_ids
from tests.tiny import IM_END, VOCAB_SIZE, make_tokenizer


@pytest.mark.parametrize(
    ("kind", "text", "answer", "other"),
    [
        (Kind.JSON, '{"type": "integer"}', "12", "1.5"),
        (Kind.JSON, '{"type": "object"}', '{"a": [1, {}]}', "[1]"),
        (Kind.REGEX, "a|b+", "bbb", "ab"),
        (Kind.CHOICE, '["ü\\n", "\\"no\\""]', '"no"', "no"),
        (Kind.CHOICE, '["a", "ab"]', "ab", "abb"),
        (Kind.GRAMMAR, 'start: "a" start | "b"', "aab", "ba"),
        (Kind.GRAMMAR, 'root ::= "a" root | "b"', "aab", "ba"),
    ],
)
def test_each_kind_is_compiled(
    grammars: Grammars, kind: Kind, text: str, answer: str, other: str
) -> None:
    grammar = compiled(grammars, kind, text)

    assert admits(grammar, answer) and not admits(grammar, other)


def test_bytes_are_spelled_as_the_pre_tokenizer_says_whatever_else_the_decoder_knows() -> None:
    """As converters of GGUF files write it."""
    tokenizer = make_tokenizer()
    replace = decoders.Replace("▁", " ")
    several = [decoders.ByteFallback(), decoders.Fuse(), replace, decoders.ByteLevel()]
    tokenizer.decoder = decoders.Sequence(several)
    matcher = LLMatcher(
        bridge(tokenizer.to_str(), VOCAB_SIZE, (IM_END,)), LLMatcher.grammar_from_regex("a b")
    )

    assert all(matcher.consume_token(token) for token in tokenizer.encode("a b").ids)


@pytest.mark.parametrize(
    ("space", "allowed"),
    [("", True), (" ", True), ("\n    ", True), ("  ", False), ("\n\n", False), ("\t", False)],
)
def test_space_in_json_has_a_bound(grammars: Grammars, space: str, allowed: bool) -> None:
    schema = {"type": "array", "items": {"type": "integer"}}
    grammar = compiled(grammars, Kind.JSON, json.dumps(schema))

    assert admits(grammar, f"[1,{space}2]") is allowed
    assert not admits(grammar, "[1] ")


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (Kind.JSON, '{"type": "strin"}', "strin"),
        (Kind.JSON, '{"not": {"type": "string"}}', "not"),
        (Kind.JSON, '{"not": {}, "x-guidance": {"lenient": true}}', "not"),
        (Kind.JSON, '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        (Kind.JSON, '{"type": "string", "format": "no-such"}', "no-such"),
        (Kind.JSON, '{"type": "string", "pattern": "^(?=a)b"}', "look-around"),
        (Kind.JSON, '{"type": "array", "minItems": 5, "maxItems": 2}', "minItems"),
        (Kind.JSON, '{"$ref": "http://127.0.0.1:1/schema"}', "127.0.0.1"),
        (Kind.JSON, '{"$ref": "#/$defs/missing"}', "missing"),
        (Kind.JSON, '{"oneOf": [{"type": "string"}, {"minLength": 2}]}', "oneOf"),
        (Kind.JSON, '{"type": ', "EOF"),
        (Kind.JSON, "[]", "object"),
        (Kind.REGEX, "a(b", "unclosed"),
        (Kind.REGEX, "a(?!b)", "look-around"),
        (Kind.GRAMMAR, 'start: "a" nobody', "nobody"),
        (Kind.GRAMMAR, "root ::= (", "Expected ')'"),
        (Kind.REGEX, "a" * (MAX_CHARS + 1), str(MAX_CHARS)),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_reason(
    grammars: Grammars, kind: Kind, text: str, reason: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compiled(grammars, kind, text)

    assert caught.value.param == "the.field"
    assert str(caught.value).startswith("the.field") and reason in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_tokenizer_of_an_unknown_kind_refuses_grammars_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "no such"}}')
    grammars = Grammars(tmp_path, VOCAB_SIZE, (IM_END,))
    with pytest.raises(InvalidRequestError, match="tokenizer of this base"):
        compiled(grammars, Kind.REGEX, "a")
    grammars.close()


def chain(rule: Callable[[int], str], count: int) -> str:
    return "start: a0\n" + "".join(rule(i) for i in range(count)) + f'a{count}: "a"\n'


def referring(count: int) -> dict[str, Any]:
    def one(i: int) -> Any:
        return {"properties": {"a": {"$ref": f"#/$defs/a{i + 1}"}}}

    return {**{f"a{i}": one(i) for i in range(count)}, f"a{count}": {"type": "string"}}


def wide(count: int) -> dict[str, Any]:
    return {f"k{i}": {"type": "string", "pattern": "^[a-z]{3,40}[0-9]+$"} for i in range(count)}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Kind.REGEX, "((((a{0,999}){0,999}){0,999}){0,999})"),
        (Kind.REGEX, "(.*a.{400}b.{400}){400}"),
        (Kind.REGEX, "|".join(f"[a-z]{{{i},{3 * i}}}x" for i in range(1, 2000))),
        (Kind.JSON, json.dumps({"type": "object", "properties": wide(1000)})),
        (Kind.JSON, json.dumps({"type": "string", "minLength": 10**9})),
        (Kind.JSON, '{"anyOf": [' * 500 + "{}" + "]}" * 500),
        (Kind.GRAMMAR, "start: " + "(" * 2000 + '"a"' + ")" * 2000),
        (Kind.GRAMMAR, chain(lambda i: f'a{i}: ("x" (a{i + 1} | "y")*)?\n', 1900)),
        (Kind.GRAMMAR, chain(lambda i: f"a{i}: a{i + 1}\n", 4000)),
        (Kind.JSON, json.dumps({"$ref": "#/$defs/a0", "$defs": referring(1050)})),
    ],
)
def test_hostile_grammars_end_soon(grammars: Grammars, kind: Kind, text: str) -> None:
    """Compiled or refused: the test's own timeout is the bound, the process lives."""
    try:
        compiled(grammars, kind, text)
    except InvalidRequestError as error:
        assert error.param == "the.field"


def test_the_loop_goes_on_while_a_grammar_is_compiled(grammars: Grammars) -> None:
    text = json.dumps({"type": "object", "properties": wide(1000)})

    async def ticks() -> int:
        work = asyncio.create_task(grammars.compile(Constraint(Kind.JSON, text, "f")))
        count = 0
        while not work.done():
            count += 1
            await asyncio.sleep(0.001)
        await work
        return count

    assert asyncio.run(ticks()) > 5


def sentencepiece() -> tuple[Tokenizer, dict[str, int]]:
    """As Llama 2 and Mistral spell texts: spaces as U+2581, bytes as <0x..>."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += ["▁", "{", "}", '"', ":", "a", "b", "▁{", "▁a", "ab", "é", "1", "2"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", "{"), ("▁", "a"), ("a", "b")]
    made = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    names = ("<unk>", "<s>", "</s>")
    made.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return made, vocab


def test_a_sentencepiece_tokenizer_is_bridged() -> None:
    tokenizer, vocab = sentencepiece()
    matcher = LLMatcher(
        bridge(tokenizer.to_str(), len(vocab) + 20, (2,)),
        LLMatcher.grammar_from_regex(r'\{"é": ab[12]世\}'),
        log_level=0,
    )
    ids = []
    while not matcher.is_stopped():
        ids.append(next_ids(matcher)[-1])
        assert matcher.consume_token(ids[-1])

    assert tokenizer.decode(ids) == '{"é": ab2世}'
