"""Constrained sequences: what they say fits their grammar, whatever runs beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from loriner.core import FinishReason, Request, SamplingParams
from loriner.engine.cpu_runner import CpuRunner
from loriner.engine.grammars import Grammars, Kind
from loriner.errors import InvalidRequestError
from loriner.model.transformer import KvCache
from tests.engines import LateRunner, LateStep, WatchedEngine, build_engine, engine_config
from tests.fakes import make_request
from tests.grammars import compiled
from tests.tiny import IM_END, VOCAB_SIZE, write_tiny_base

BLOCK = 4
SHORT = r"[a-z]{3,9}: (yes|no)"
POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 99},
        "ok": {"type": "boolean"},
    },
    "required": ["x", "ok"],
    "additionalProperties": False,
}


class Lab:
    """A tiny base on a synchronous runner and on one that is late."""

    def __init__(self, folder: Path) -> None:
        self.base = write_tiny_base(folder / "base")
        self.grammars = Grammars(self.base, VOCAB_SIZE, (IM_END,))
        self.runners = {
            late: kind(engine_config(self.base))
            for late, kind in ((False, CpuRunner), (True, LateRunner))
        }

    def engine(self, *, late: bool = False, num_blocks: int = 256, **config: Any) -> WatchedEngine:
        runner = self.runners[late]
        runner.kv = KvCache(runner.model_config, num_blocks, BLOCK, torch.float32)
        runner.max_len = min(512, num_blocks * BLOCK)
        if isinstance(runner, LateRunner):
            runner.reset()
        return build_engine(engine_config(self.base, block_size=BLOCK, **config), {}, runner)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("guides"))


def regex_request(lab: Lab, regex: str = SHORT, **fields: Any) -> Request:
    fields = {"max_tokens": 64, **fields}
    return make_request(grammar=compiled(lab.grammars, Kind.REGEX, regex), **fields)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.8])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}])
def test_an_answer_matches_its_grammar(
    lab: Lab, late: bool, temperature: float, filters: dict[str, Any]
) -> None:
    engine = lab.engine(late=late)
    engine.run_all([regex_request(lab, n=5, temperature=temperature, seed=3, **filters)])
    engine.close()

    texts = {engine.text["r", index] for index in range(5)}
    assert all(re.fullmatch(SHORT, text) for text in texts)
    assert len(texts) == 1 if temperature == 0.0 else len(texts) > 1
    assert {end.finish_reason for end in engine.ends.values()} == {FinishReason.STOP}


def test_a_json_schema_is_kept(lab: Lab) -> None:
    grammar = compiled(lab.grammars, Kind.JSON, json.dumps(POINT))
    engine = lab.engine()
    engine.run_all([make_request(grammar=grammar, max_tokens=100, n=4, temperature=1.0)])
    engine.close()

    for index in range(4):
        answer = json.loads(engine.text["r", index])
        assert set(answer) == {"x", "ok"} and 0 <= answer["x"] <= 99


def test_the_end_comes_only_where_the_grammar_has_one(lab: Lab) -> None:
    bias = ((IM_END, 100.0),)
    engine = lab.engine()
    engine.run_all([regex_request(lab, "[ab]{4,40}", logit_bias=bias, temperature=1.0)])
    engine.close()

    assert re.fullmatch("[ab]{4}", engine.text["r", 0])
    assert engine.outputs["r", 0][-1] == IM_END
    assert engine.ends["r", 0].finish_reason is FinishReason.STOP


@pytest.mark.parametrize(("max_tokens", "reason"), [(2, "length"), (3, "stop"), (9, "stop")])
def test_a_finished_grammar_ends_without_another_step(
    lab: Lab, max_tokens: int, reason: str
) -> None:
    engine = lab.engine()
    engine.run_all([regex_request(lab, "abc", max_tokens=max_tokens)])
    engine.close()

    assert engine.text["r", 0] == "abc"[:max_tokens]
    assert engine.ends["r", 0].finish_reason == reason
    assert len(engine.outputs["r", 0]) == min(3, max_tokens)


def test_a_stop_string_ends_before_the_grammar_does(lab: Lab) -> None:
    engine = lab.engine()
    engine.run_all([regex_request(lab, "abc: [x]{9}", stop=(": ",))])
    engine.close()

    assert engine.text["r", 0] == "abc"
    assert engine.ends["r", 0].stop_reason == ": "


def test_log_probabilities_are_the_models_own(lab: Lab) -> None:
    engine = lab.engine()
    engine.run_all([regex_request(lab, "q", logprobs=3), make_request(request_id="free")])
    engine.close()
    (entry,) = engine.ends["r", 0].logprobs

    assert entry.token == "q" and len(entry.top) == 3
    assert entry.top[0].token_id == engine.outputs["free", 0][0]
    assert entry.logprob < entry.top[0].logprob


def mixture(lab: Lab) -> list[Request]:
    """Free and constrained, greedy and drawn, with and without penalties."""
    requests = []
    for i in range(12):
        fields: dict[str, Any] = {"request_id": f"{i}", "seed": i, "max_tokens": 24}
        fields |= {"temperature": (0.0, 1.0)[i % 2], "n": 1 + i % 3}
        fields |= {"repetition_penalty": 1.2} if i % 5 == 0 else {}
        prompt = [(7 * i + k) % 256 for k in range(3 + i)]
        if i % 2 or i % 3 == 0:
            fields["grammar"] = compiled(
                lab.grammars, Kind.REGEX, SHORT if i % 4 else r"(\d+,){1,8}\."
            )
        requests.append(make_request(prompt, **fields))
    return requests


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("num_blocks", [256, 32])
def test_neighbours_and_preemptions_change_no_token(lab: Lab, late: bool, num_blocks: int) -> None:
    alone: dict[Any, Any] = {}
    for request in mixture(lab):
        engine = lab.engine()
        engine.run_all([request])
        engine.close()
        alone |= engine.outputs
    engine = lab.engine(late=late, num_blocks=num_blocks, max_step_tokens=24)
    engine.run_all(mixture(lab))
    engine.close()

    assert engine.outputs == alone
    assert num_blocks == 256 or engine.scheduler.num_preemptions > 0


def test_constrained_rows_run_ahead_as_free_ones_do(lab: Lab) -> None:
    engine = lab.engine(late=True)
    free = make_request(request_id="free", max_tokens=8, ignore_eos=True)
    engine.run_all([free, regex_request(lab, "[ab]{8}")])
    engine.close()
    runner = lab.runners[True]
    assert isinstance(runner, LateRunner)
    ahead = [int((step.token_source >= 0).sum()) for step in runner.launched]
    assert sum(ahead) >= 7 + 7, "the free one's, and the eight of the other from its second on"
    is_guided = [any(draw.guide for draw in step.draws) for step in runner.launched]
    first = is_guided.index(True)  # before it, the grammar is compiled, for as long as that takes
    assert is_guided[first : first + 8] == [True] * 8, "in every step"
    assert len(is_guided) <= first + 9, "and one that ran ahead of its end"


def test_a_choice_that_fails_ends_its_step_alone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = lab.engine(late=True)
    engine.submit(regex_request(lab, "[ab]{8}"))
    engine.guides._compiler.submit(int).result()  # its grammar is compiled
    engine.submit(make_request(request_id="free", max_tokens=8, ignore_eos=True))
    while len(engine.scheduler.running) < 2:
        engine.step()

    def fail(step: LateStep) -> None:
        step._runner._queue.remove(step)
        raise RuntimeError("secret internals")

    with monkeypatch.context() as patch:
        patch.setattr(LateStep, "choose", fail)
        engine.run_all()
    assert {str(end.error) for end in engine.ends.values()} == {"The engine failed."}

    engine.run_all([regex_request(lab, "[ab]{8}", request_id="next")])
    engine.check_integrity()
    engine.close()
    assert re.fullmatch("[ab]{8}", engine.text["next", 0])


def test_an_abort_while_the_grammar_is_compiled_leaves_nothing(lab: Lab) -> None:
    engine = lab.engine()
    engine.submit(regex_request(lab, n=2))
    engine.note(engine.abort("r"))
    engine.guides._compiler.submit(int).result()  # it has ended
    engine.step()
    engine.close()

    assert not engine.has_work and not engine.scheduler.waiting
    assert {end.finish_reason for end in engine.ends.values()} == {FinishReason.ABORT}


def test_a_grammar_the_engine_cannot_compile_fails_its_request_alone(lab: Lab) -> None:
    engine = lab.engine()
    engine.run_all([make_request(grammar="nonsense", n=2), make_request(request_id="free")])
    engine.close()

    for index in range(2):
        end = engine.ends["r", index]
        assert end.error_kind == "InvalidRequestError" and "grammar" in (end.error or "")
    assert engine.ends["free", 0].finish_reason is FinishReason.LENGTH


def test_a_grammar_that_gets_too_hard_fails_its_sequence_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llguidance import LLParserLimits

    hard = LLParserLimits(step_lexer_fuel=1, step_max_items=1, precompute_large_lexemes=False)
    monkeypatch.setattr("loriner.engine.guides.LIMITS", hard)
    engine = lab.engine()
    grammar = compiled(lab.grammars, Kind.JSON, json.dumps({"type": "object"}))
    engine.run_all([make_request(grammar=grammar, max_tokens=40), make_request(request_id="free")])
    engine.close()

    assert engine.ends["r", 0].error_kind == "InvalidRequestError"
    assert engine.ends["free", 0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("field", ["ignore_eos", "min_tokens"])
def test_what_a_grammar_cannot_keep_is_refused(field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(grammar="{}", **{field: True if field == "ignore_eos" else 3})
    assert caught.value.param == field
