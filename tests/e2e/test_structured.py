"""Structured answers of the real base, with and without an adapter: all that finish validate, and
nobody beside them notices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from tokenizers import Tokenizer

from loriner.adapters import formats
from loriner.adapters.pool import pack
from loriner.core import FinishReason, Request
from loriner.engine.cpu_runner import CpuRunner
from loriner.engine.grammars import Constraint, Grammars, Kind
from loriner.model.transformer import layout
from tests.answer_schemas import Case, cases
from tests.engines import WatchedEngine, build_engine, engine_config
from tests.fakes import make_request

ADAPTERS = Path(str(files("loriner"))) / "data" / "adapters"
CASES = cases()
A_DOZEN = [*range(0, 36, 4), 53, 70, 85]
MAX_TOKENS = 160
FORMATS = FormatChecker(("email", "ipv4", "ipv6", "uuid"))  # a grammar knows no leap years

pytestmark = pytest.mark.timeout(900)


class Lab:
    """The real base with one of its adapters, and its grammars."""

    def __init__(self, base: Path) -> None:
        self.runner = CpuRunner(engine_config(base, num_threads=2))
        modules, place = self.runner.model_config.modules(), layout(self.runner.model_config)
        adapter = formats.load(ADAPTERS / "json", modules)
        self.weights = {"json": pack(adapter, place, self.runner.dtype)}
        config = self.runner.model_config
        self.grammars = Grammars(base, config.vocab_size, config.eos_token_ids)
        self._base = base
        self._tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))

    def engine(self) -> WatchedEngine:
        return build_engine(engine_config(self._base), self.weights, self.runner)

    def request(self, name: str, case: Case, index: int, generation: str | None) -> Request:
        """Greedy for one in two; the others are drawn."""
        constraint = Constraint(Kind.JSON, json.dumps(case.schema), "schema")
        return self.free(
            name,
            f"{case.question} Answer in JSON.",
            generation=generation,
            grammar=asyncio.run(self.grammars.compile(constraint)),
            temperature=float(index % 2),
            seed=index,
            max_tokens=MAX_TOKENS,
        )

    def free(self, name: str, text: str, **fields: object) -> Request:
        chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = self._tokenizer.encode(chat, add_special_tokens=False).ids
        return make_request(ids, request_id=name, **fields)


@pytest.fixture(scope="module")
def lab(smollm2: Path) -> Iterator[Lab]:
    made = Lab(smollm2)
    yield made
    made.grammars.close()


def check(lab: Lab, chosen: list[int]) -> None:
    """All finished answers to these cases validate, and most answers finish."""
    engine = lab.engine()
    requests = [
        lab.request(f"{generation}/{i}", CASES[i], i, generation)
        for i in chosen
        for generation in (None, "json")
    ]
    engine.run_all(requests)
    engine.close()
    finished = 0
    for (name, _), end in engine.ends.items():
        assert end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), end
        if end.finish_reason is FinishReason.STOP:
            schema = CASES[int(name.partition("/")[2])].schema
            validator = Draft202012Validator(schema, format_checker=FORMATS)
            validator.validate(json.loads(engine.text[name, 0]))
            finished += 1
    assert finished >= 0.9 * len(requests), f"{finished} of {len(requests)} finished"


def test_there_are_a_hundred_schemas() -> None:
    assert len({json.dumps(case.schema) for case in CASES}) == 100


def test_a_dozen_schemas_are_kept(lab: Lab) -> None:
    check(lab, A_DOZEN)


@pytest.mark.slow
def test_a_hundred_schemas_are_kept(lab: Lab) -> None:
    check(lab, list(range(100)))


def test_free_neighbours_say_what_they_say_alone(lab: Lab) -> None:
    asked = ["What is a loriner?", "Tell me about Paris.", "Write a poem."]
    free = [
        lab.free(f"{i}", text, max_tokens=24, temperature=float(i % 2), seed=i, generation=which)
        for i, text in enumerate(asked)
        for which in ((None, "json")[i % 2],)
    ]
    engine = lab.engine()
    engine.run_all(free)
    engine.close()
    alone = dict(engine.outputs)
    engine = lab.engine()
    constrained = [lab.request(f"c{i}", CASES[i], i, (None, "json")[i % 2]) for i in range(6)]
    engine.run_all([*constrained[:3], *free, *constrained[3:]])
    engine.close()

    assert {key: engine.outputs[key] for key in alone} == alone
