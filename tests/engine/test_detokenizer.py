"""Text from tokens: whole characters, stop strings that never leak."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loriner.engine.detokenizer import Detokenizer
from tests.tiny import IM_START, make_tokenizer


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token, so every character beyond ASCII is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = byte_tokenizer()


def run(
    text: str, stop: tuple[str, ...] = (), include: bool = False
) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(TOKENIZER, stop, include)
    pieces = []
    for token_id in TOKENIZER.encode(text).ids:
        piece, found = detokenizer.push(token_id)
        pieces.append(piece)
        if found is not None:
            return pieces, found
    pieces.append(detokenizer.flush())
    return pieces, None


@settings(max_examples=100)
@given(st.text(max_size=40))
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    pieces, _ = run(text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def byte_fallback_tokenizer() -> Tokenizer:
    """Llama 2's form: words with a leading mark, and bytes for all else."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {"\u2581a": 256, "b": 257, "\u2581": 258}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@settings(max_examples=300)
@given(st.lists(st.integers(0, 258), max_size=30))
def test_no_sequence_of_tokens_raises(ids: list[int]) -> None:
    tokenizer = byte_fallback_tokenizer()
    detokenizer = Detokenizer(tokenizer, (), False)
    text = "".join(detokenizer.push(token_id)[0] for token_id in ids) + detokenizer.flush()
    if all(token_id >= 256 for token_id in ids):
        assert text == tokenizer.decode(ids)


def test_tokens_without_text_do_not_pile_up() -> None:
    detokenizer = Detokenizer(TOKENIZER, (), False)
    half = TOKENIZER.encode("é").ids[:1]
    for _ in range(200):
        detokenizer.push(half[0])
        assert len(detokenizer._pending) < 17 and len(detokenizer._context) < 17


def test_a_character_cut_by_the_end_is_marked() -> None:
    detokenizer = Detokenizer(TOKENIZER, (), False)
    for token_id in TOKENIZER.encode("aé").ids[:-1]:
        detokenizer.push(token_id)
    assert detokenizer.flush() == "\ufffd"


@settings(max_examples=150)
@given(st.text("abé", max_size=25), st.lists(st.text("abé", min_size=1, max_size=4), min_size=1))
def test_a_stop_string_never_leaks(text: str, stops: list[str]) -> None:
    pieces, found = run(text, tuple(stops))
    out = "".join(pieces)
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    assert (found is None) == (not any(stop in text for stop in stops))


@pytest.mark.parametrize(("include", "expected"), [(False, "one "), (True, "one END")])
def test_the_stop_string_is_included_on_request(include: bool, expected: str) -> None:
    pieces, found = run("one END two", ("END",), include)
    assert "".join(pieces) == expected and found == "END"


def test_text_that_only_began_a_stop_string_comes_out() -> None:
    pieces, found = run("one EN two", ("END",))
    assert "".join(pieces) == "one EN two" and found is None


def test_stopping_can_be_barred() -> None:
    detokenizer = Detokenizer(TOKENIZER, ("b",), False)
    ids = TOKENIZER.encode("abb").ids
    assert detokenizer.push(ids[0], can_stop=False) == ("a", None)
    assert detokenizer.push(ids[1], can_stop=False) == ("b", None)
    assert detokenizer.push(ids[2]) == ("", "b")


def test_special_tokens_show_when_asked() -> None:
    ids = [104, 105, IM_START, 97]
    for skip, text in ((True, "hia"), (False, "hi<|im_start|>a")):
        detokenizer = Detokenizer(make_tokenizer(), (), False, skip_special=skip)
        pieces = [detokenizer.push(token)[0] for token in ids]
        assert "".join(pieces) + detokenizer.flush() == text
