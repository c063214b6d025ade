"""The engine on a runner that is one step behind: same tokens, nothing too many, nothing lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLMatcher

from loriner.adapters.pool import SeatWeights
from loriner.core import Event, FinishReason, Request
from loriner.engine.cpu_runner import CpuRunner
from loriner.engine.step_input import StepInput
from loriner.model.transformer import KvCache
from tests.e2e.test_neighbours import random_adapters
from tests.engines import Key, LateRunner, WatchedEngine, build_engine, engine_config
from tests.fakes import make_request
from tests.tiny import IM_END, write_tiny_base

BLOCK = 4
REGEXES = ("[a-z]{1,12}", r"(\d,){3,9}\.", "yes|no", r"\{[^}]{0,30}\}")
NOT_WITH_GRAMMAR = {"ignore_eos", "min_tokens"}


class Lab:
    """A tiny base on a synchronous runner and on one that is late, and adapters for it."""

    def __init__(self, folder: Path) -> None:
        self.base = write_tiny_base(folder / "base")
        self.runners = {
            late: kind(engine_config(self.base))
            for late, kind in ((False, CpuRunner), (True, LateRunner))
        }
        self.weights: Mapping[str, SeatWeights] = random_adapters(self.runners[False])

    @property
    def late(self) -> LateRunner:
        runner = self.runners[True]
        assert isinstance(runner, LateRunner)
        return runner

    def engine(self, *, late: bool = True, num_blocks: int = 256, **config: Any) -> WatchedEngine:
        runner = self.runners[late]
        runner.kv = KvCache(runner.model_config, num_blocks, BLOCK, torch.float32)
        runner.max_len = min(512, num_blocks * BLOCK)
        if late:
            self.late.reset()
        return build_engine(
            engine_config(self.base, block_size=BLOCK, **config), self.weights, runner
        )


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("pipeline"))


def until(engine: WatchedEngine, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        engine.step()


def rows(steps: list[StepInput]) -> int:
    return sum(step.num_rows for step in steps)


def random_request(rng: random.Random, request_id: str) -> Request:
    """Everything that ends or bends a sequence, in all mixtures."""
    params: dict[str, Any] = {
        "max_tokens": rng.randint(1, 14),
        "temperature": rng.choice([0.0, 0.0, 0.8, 1.5]),
        "seed": rng.randint(0, 1000),
        "n": rng.choice([1, 1, 1, 2, 3]),
        "ignore_eos": rng.random() < 0.5,
    }
    maybe: dict[str, Any] = {
        "top_k": rng.randint(1, 50),
        "top_p": 0.8,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.7,
        "logit_bias": ((IM_END, 4.0), (65, 3.0)),
        "min_tokens": rng.randint(0, params["max_tokens"]),
        "logprobs": 2,
        "stop": tuple(rng.sample(["a", "b", "\x01", "Z", "e", "\n"], 3)),
        "stop_token_ids": tuple(rng.sample(range(256), 40)),
    }
    params |= {name: value for name, value in maybe.items() if rng.random() < 0.2}
    if rng.random() < 0.25:
        params = {name: value for name, value in params.items() if name not in NOT_WITH_GRAMMAR}
        params["grammar"] = LLMatcher.grammar_from_regex(rng.choice(REGEXES))
    prompt = [rng.randrange(256) for _ in range(rng.randint(1, 30))]
    if rng.random() < 0.4:
        prompt = list(range(rng.randint(9, 25)))  # shared prefixes
    generation = None if rng.random() < 0.3 else f"g{rng.randrange(5)}"
    salt = rng.choice("aaaab")
    return make_request(prompt, request_id=request_id, generation=generation, salt=salt, **params)


def answers(engine: WatchedEngine) -> dict[Key, tuple[Any, ...]]:
    return {
        key: (engine.outputs[key], engine.text[key], end.finish_reason, end.stop_reason)
        for key, end in engine.ends.items()
    }


@pytest.mark.parametrize("seed", range(24))
def test_one_step_behind_gives_the_tokens_of_the_synchronous_engine(lab: Lab, seed: int) -> None:
    rng = random.Random(seed)
    settings = {
        "num_blocks": rng.choice([28, 48, 256]),
        "max_step_tokens": rng.choice([16, 40, 512]),
        "max_sequences": rng.choice([2, 5, 16]),
        "max_seats": rng.choice([1, 2, 8]),
        "prefix_cache": rng.random() < 0.7,
    }
    requests = [random_request(rng, str(i)) for i in range(20)]
    gaps = [rng.randint(0, 3) for _ in requests]
    results = []
    for late in (False, True):
        engine = lab.engine(late=late, **settings)
        for request, gap in zip(requests, gaps, strict=True):
            engine.submit(request)
            for _ in range(gap):
                engine.step()
        engine.run_all()
        engine.close()
        results.append(answers(engine))
    assert results[0] == results[1]


def test_the_next_step_is_launched_before_the_last_is_read(lab: Lab) -> None:
    engine = lab.engine()
    engine.submit(make_request(max_tokens=4, ignore_eos=True))
    assert engine.step() == [] and len(lab.late.launched) == 1
    assert len(engine.step()) == 1 and len(lab.late.launched) == 2
    assert lab.late.launched[1].token_source.tolist() == [0]
    engine.run_all()


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_costs_no_row_too_many(lab: Lab, max_tokens: int) -> None:
    engine = lab.engine()
    engine.run_all([make_request([1, 2, 3], max_tokens=max_tokens, ignore_eos=True)])
    assert len(engine.outputs["r", 0]) == max_tokens
    assert rows(lab.late.launched) == 3 + max_tokens - 1


def test_the_context_is_filled_and_not_overrun(lab: Lab) -> None:
    engine = lab.engine(num_blocks=4)
    engine.run_all([make_request(range(10), max_tokens=None, ignore_eos=True)])
    assert len(engine.outputs["r", 0]) == 6
    assert engine.ends["r", 0].finish_reason is FinishReason.LENGTH
    assert max(int(step.context.max()) for step in lab.late.launched) == 15


def test_the_row_under_way_of_an_ended_sequence_is_discarded(lab: Lab) -> None:
    engine = lab.engine()
    engine.run_all([make_request([1, 2, 3], max_tokens=40, ignore_eos=True)])
    stop = engine.outputs["r", 0][2]
    first = engine.outputs["r", 0].index(stop)
    engine = lab.engine()
    engine.run_all(
        [make_request([1, 2, 3], max_tokens=40, stop_token_ids=(stop,), ignore_eos=True)]
    )
    assert engine.ends["r", 0].finish_reason is FinishReason.STOP
    assert len(engine.outputs["r", 0]) == first + 1
    assert rows(lab.late.launched) == 3 + first + 1  # one row for nothing


def test_what_the_host_must_see_is_not_launched_ahead(lab: Lab) -> None:
    engine = lab.engine()
    plain = make_request([1, 2, 3], request_id="plain", max_tokens=8, ignore_eos=True)
    bent = make_request(
        [4, 5], request_id="bent", max_tokens=8, repetition_penalty=1.5, ignore_eos=True
    )
    engine.run_all([plain, bent])
    ahead = [int((step.token_source >= 0).sum()) for step in lab.late.launched]
    assert max(ahead) == 1 and sum(ahead) == 7  # all of plain's, none of bent's
    assert len(engine.outputs["bent", 0]) == 8


def test_an_abort_takes_effect_at_once_and_ends_once(lab: Lab) -> None:
    engine = lab.engine()
    for name in ("gone", "stays"):
        engine.submit(make_request(request_id=name, generation="g1", max_tokens=9, ignore_eos=True))
    until(engine, lambda: len(engine.outputs.get(("gone", 0), [])) == 2)
    engine.note(engine.abort("gone"))
    assert engine.abort("gone") == []
    engine.run_all()
    assert engine.ends["gone", 0].finish_reason is FinishReason.ABORT
    assert len(engine.outputs["gone", 0]) == 2
    assert len(engine.outputs["stays", 0]) == 9


def test_an_abort_of_all_leaves_nothing_under_way(lab: Lab) -> None:
    engine = lab.engine()
    engine.submit(make_request(max_tokens=9))
    engine.step()
    engine.note(engine.abort("r"))
    assert engine.has_work, "a launched step has to be read"
    engine.run_all()
    engine.step()
    assert not engine.ran


def test_a_launch_that_fails_ends_its_sequences_after_what_was_under_way(lab: Lab) -> None:
    engine = lab.engine()
    engine.submit(make_request(request_id="lost", max_tokens=9, ignore_eos=True))
    until(engine, lambda: len(engine.outputs.get(("lost", 0), [])) == 2)
    launch = lab.late.launch
    lab.late.launch = fail  # type: ignore[method-assign, assignment]
    engine.step()
    lab.late.launch = launch  # type: ignore[method-assign]
    assert engine.ends["lost", 0].finish_reason is FinishReason.ERROR
    assert len(engine.outputs["lost", 0]) == 3, "the step before had ended well"
    engine.run_all([make_request(request_id="after", max_tokens=3, ignore_eos=True)])
    assert len(engine.outputs["after", 0]) == 3


def fail(step: StepInput) -> None:
    raise RuntimeError("secret internals")


def test_a_step_that_fails_spares_who_joined_after_it(lab: Lab) -> None:
    engine = lab.engine()
    engine.submit(make_request([1, 2, 3], request_id="lost", max_tokens=9, ignore_eos=True))
    until(engine, lambda: len(engine.outputs.get(("lost", 0), [])) == 2)
    lab.late.broken.add(len(lab.late.launched) - 1)  # under way now
    joined = make_request([7, 8, 9], request_id="joined", max_tokens=9, ignore_eos=True)
    engine.submit(joined)
    engine.run_all()
    assert engine.ends["lost", 0].finish_reason is FinishReason.ERROR
    assert "secret" not in str(engine.ends["lost", 0].error)
    assert engine.ends["joined", 0].finish_reason is FinishReason.LENGTH
    alone = lab.engine()
    alone.run_all([joined])
    assert engine.outputs["joined", 0] == alone.outputs["joined", 0]


def test_a_runner_that_cannot_go_on_stops_the_engine(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = lab.engine()
    engine.submit(make_request(max_tokens=9))
    engine.step()
    lab.late.broken.add(0)

    def check() -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(lab.late, "check", check)
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.step()


def test_a_preempted_sequence_keeps_the_token_that_was_under_way(lab: Lab) -> None:
    requests = [
        make_request(range(40 * i, 40 * i + 9), request_id=str(i), max_tokens=12, ignore_eos=True)
        for i in range(3)
    ]
    roomy = lab.engine(late=False)
    roomy.run_all(requests)
    tight = lab.engine(num_blocks=9)
    tight.run_all(requests)
    assert tight.scheduler.num_preemptions > 0
    assert tight.outputs == roomy.outputs


WAYS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"ignore_eos": True},
    "seeded": {"temperature": 1.1, "seed": 5, "top_p": 0.9, "ignore_eos": True},
    "looking back": {"temperature": 0.8, "seed": 6, "frequency_penalty": 0.7, "ignore_eos": True},
    "with log-probabilities": {"logprobs": 2, "ignore_eos": True},
    "structured": {"grammar": LLMatcher.grammar_from_regex(r"\{([a-z]{3},){9}[0-9]{5}\}")},
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_who_gives_way_to_another_tenant_goes_on_as_if_alone(
    lab: Lab, way: str, prefix_cache: bool, late: bool
) -> None:
    def ask(tenant: str, index: int, num_tokens: int) -> Request:
        prompt = range(7 * index, 7 * index + 9)
        return make_request(
            prompt,
            request_id=f"{tenant}{index}",
            generation=f"g{index % 3}",
            salt=tenant,
            **{"max_tokens": num_tokens, **WAYS[way]},
        )

    flood, visits = [ask("a", i, 50) for i in range(3)], [ask("b", i, 3) for i in range(6)]
    engine = lab.engine(late=late, max_sequences=2, prefix_cache=prefix_cache)
    for request in flood:
        engine.submit(request)
    until(engine, lambda: len(engine.scheduler.waiting) == 1)
    for visit in visits:
        engine.submit(visit)
        for _ in range(7):
            engine.step()
    engine.run_all()

    assert engine.scheduler.num_preemptions > 2
    for request in flood + visits:
        alone = lab.engine(late=False, prefix_cache=False)
        alone.run_all([request])
        key = request.request_id, 0
        assert answers(engine)[key] == answers(alone)[key]
        assert engine.logprobs[key] == pytest.approx(alone.logprobs[key], abs=1e-4)
        assert bool(alone.logprobs[key]) == (request.sampling.logprobs is not None)
        alone.close()
    engine.close()


def test_an_adapter_evicted_while_its_last_rows_are_under_way_does_no_harm(lab: Lab) -> None:
    answers = {}
    for name in ("g1", "g2"):
        alone = lab.engine()
        alone.run_all(
            [make_request(generation=name, request_id=name, max_tokens=6, ignore_eos=True)]
        )
        answers[name, 0] = alone.outputs[name, 0]
    engine = lab.engine(max_seats=1)
    stopping = make_request(
        generation="g1",
        request_id="g1",
        max_tokens=20,
        stop_token_ids=(answers["g1", 0][2],),
        ignore_eos=True,
    )
    engine.submit(stopping)
    engine.submit(make_request(generation="g2", request_id="g2", max_tokens=6, ignore_eos=True))
    engine.run_all()
    assert engine.pool.num_evictions > 0
    assert engine.outputs["g1", 0] == answers["g1", 0][: len(engine.outputs["g1", 0])]
    assert engine.outputs["g2", 0] == answers["g2", 0]


def test_a_prefix_is_found_only_when_its_step_has_ended(lab: Lab) -> None:
    engine = lab.engine()
    engine.submit(make_request(range(12), request_id="a", max_tokens=6, ignore_eos=True))
    engine.step()
    engine.submit(make_request(range(12), request_id="b", max_tokens=2, ignore_eos=True))
    events: list[Event] = []
    engine.step()  # "a" has been launched and not read
    assert len(lab.late.launched[1].token_ids) == 1 + 12
    engine.run_all()
    engine.submit(make_request(range(12), request_id="c", max_tokens=2, ignore_eos=True))
    while engine.has_work:
        events += engine.step()
    assert events[-1].num_cached_tokens == 8


def test_choices_share_the_prompt_of_the_first(lab: Lab) -> None:
    engine = lab.engine()
    engine.run_all([make_request(range(20), n=3, max_tokens=4, temperature=1.0, ignore_eos=True)])
    assert engine.ends["r", 1].num_cached_tokens == engine.ends["r", 2].num_cached_tokens == 16
