"""Structured answers on a GPU: constrained rows beside free ones, each as it is alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from loriner.config import GIB
from loriner.core import Request
from loriner.engine.runner import open_runner
from tests.canaries import CANARIES
from tests.engines import WatchedEngine, engine_config
from tests.fakes import make_request

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

REGEX = r'\{"word": "[a-z]{3,9}", "sure": (true|false)\}'


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[WatchedEngine]:
    config = engine_config(
        smollm2, device="cuda", kv_bytes=GIB, pool_bytes=GIB // 4, prefix_cache=False
    )
    made = WatchedEngine(config, open_runner(config), {}.__getitem__)
    yield made
    made.close()


def requests(base: Path) -> list[Request]:
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    grammar = LLMatcher.grammar_from_regex(REGEX)
    made = []
    for i, text in enumerate(CANARIES[:12]):
        fields = {"grammar": grammar} if i % 2 else {"ignore_eos": True}
        ids = tokenizer.encode(text).ids
        made.append(
            make_request(
                ids,
                request_id=str(i),
                seed=i,
                temperature=float(i % 3),
                max_tokens=48,
                **fields,
            )
        )
    return made


def test_constrained_rows_fit_and_disturb_nobody(engine: WatchedEngine, smollm2: Path) -> None:
    asked = requests(smollm2)
    for request in asked:
        engine.run_all([request])
    assert not [end.error for end in engine.ends.values() if end.error]
    alone, texts = dict(engine.outputs), dict(engine.text)
    for kept in (engine.outputs, engine.text, engine.ends):
        kept.clear()
    engine.run_all(asked)

    assert engine.outputs == alone
    assert all(re.fullmatch(REGEX, texts[str(i), 0]) for i in range(1, 12, 2))
