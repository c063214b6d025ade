"""Grammars for tests, over the tiny base's tokenizer: compile them, and walk what they admit."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from llguidance import LLMatcher
from tokenizers import Tokenizer

from loriner.engine.grammars import Constraint, Grammars, Kind, bridge
from tests.tiny import IM_END, VOCAB_SIZE, make_tokenizer


@contextmanager
def open_grammars(tokenizer: Tokenizer | None = None) -> Iterator[Grammars]:
    """Those of the tiny base, or of a tokenizer like its own."""
    with tempfile.TemporaryDirectory() as folder:
        (tokenizer or make_tokenizer()).save(f"{folder}/tokenizer.json")
        grammars = Grammars(Path(folder), VOCAB_SIZE, (IM_END,))
        yield grammars
        grammars.close()


def compiled(
    grammars: Grammars, kind: Kind, text: str, param: str = "the.field", before: str = ""
) -> str:
    """See `Constraint`."""
    return asyncio.run(grammars.compile(Constraint(kind, text, param, before)))


def matcher_of(grammar: str, tokenizer: Tokenizer | None = None) -> LLMatcher:
    """At the beginning of a compiled grammar."""
    trie = bridge((tokenizer or make_tokenizer()).to_str(), VOCAB_SIZE, (IM_END,))
    return LLMatcher(trie, grammar, log_level=0)


def admits(grammar: str, text: str, tokenizer: Tokenizer | None = None) -> bool:
    """Whether `text` is a whole answer."""
    ids = (tokenizer or make_tokenizer()).encode(text, add_special_tokens=False).ids
    matcher = matcher_of(grammar, tokenizer)
    return matcher.consume_tokens(ids) and matcher.is_accepting()


def next_ids(matcher: LLMatcher) -> list[int]:
    """The tokens that may follow, ascending."""
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return [int(token_id) for token_id in np.flatnonzero(bits)]
