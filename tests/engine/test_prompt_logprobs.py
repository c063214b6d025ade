"""Log-probabilities of prompts in the engine: the same whatever runs beside them and however they
are cut, once for all choices, and nothing else changes."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from loriner.adapters.adapter import Adapter, LoraWeight
from loriner.adapters.pool import pack
from loriner.core import Event, Request, TokenLogprob
from loriner.engine.cpu_runner import CpuRunner
from loriner.engine.readings import scores
from loriner.model.transformer import layout
from tests.engine.test_embeddings import KINDS, PROMPTS, Lab, watch
from tests.engine.test_pipeline import answers, random_request
from tests.engines import Key, WatchedEngine
from tests.fakes import make_request

Told = dict[Key, tuple[TokenLogprob, ...]]


def requests(**fields: Any) -> list[Request]:
    return [
        make_request(
            prompt,
            request_id=name,
            generation=generation,
            **{"prompt_logprobs": 3, "max_tokens": 4, "ignore_eos": True, **fields},
        )
        for name, (prompt, generation) in PROMPTS.items()
    ]


def run(engine: WatchedEngine, asked: list[Request]) -> Told:
    """What was told of each prompt; it comes with a choice's first event or not at all."""
    told: Told = {}
    seen: set[Key] = set()
    note = engine.note

    def noted(events: list[Event]) -> None:
        for event in events:
            key = (event.request_id, event.index)
            if event.prompt_logprobs:
                assert key not in seen, "not the first event"
                told[key] = event.prompt_logprobs
            if event.index:
                assert (event.request_id, 0) in seen, "a choice before the first one"
            seen.add(key)
        note(events)

    engine.note = noted  # type: ignore[method-assign, assignment]
    engine.run_all(asked)
    engine.close()
    return told


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """With an adapter of the last linear."""
    lab = Lab(tmp_path_factory.mktemp("prompts"))
    config, generator = lab.runners[CpuRunner].model_config, torch.Generator().manual_seed(1)
    outputs, inputs = config.modules()["lm_head"]
    a = torch.randn(4, inputs, generator=generator)
    head = LoraWeight(a, torch.randn(outputs, 4, generator=generator), None, 1.0)
    packed = pack(Adapter.of({"lm_head": head}), layout(config), torch.float32)
    lab.weights = {**lab.weights, "head": packed}
    return lab


@pytest.fixture(scope="module")
def alone(lab: Lab) -> Told:
    told: Told = {}
    for request in requests():
        told |= run(lab.engine(CpuRunner, prefix_cache=False), [request])
    return told


def check(told: Told, alone: Told) -> None:
    assert told.keys() == alone.keys()
    for key, entries in told.items():
        for one, other in zip(entries, alone[key], strict=True):
            assert one.token_id == other.token_id and one.token == other.token
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4, nan_ok=True)
            assert len(one.top) == len(other.top)
            for best, expected in zip(one.top, other.top, strict=True):
                assert best.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_every_token_but_the_first_has_one(alone: Told) -> None:
    for (name, _), entries in alone.items():
        prompt, _ = PROMPTS[name]
        assert [entry.token_id for entry in entries] == prompt
        assert math.isnan(entries[0].logprob) and not entries[0].top
        for entry in entries[1:]:
            assert entry.rank >= 1 and [one.rank for one in entry.top] == [1, 2, 3]
            assert entry.logprob <= entry.top[0].logprob
            assert (entry.rank == 1) == (entry.token_id == entry.top[0].token_id)


@pytest.mark.parametrize("generation", ["g1", "head"])
def test_it_is_what_the_token_has_as_an_answer(lab: Lab, generation: str) -> None:
    """Each prefix of a prompt continued by one token: the likeliest are those that were told."""
    prompt, _ = PROMPTS["g1/17"]
    asked = make_request(prompt, generation=generation, prompt_logprobs=3)
    ((_, *told),) = run(lab.engine(CpuRunner), [asked]).values()
    for place, entries in enumerate(told, 1):
        engine = lab.engine(CpuRunner)
        request = make_request(prompt[:place], generation=generation, max_tokens=1, logprobs=3)
        engine.submit(request)
        events: list[Event] = []
        while engine.has_work:
            events += engine.step()
        engine.close()
        ((entry,),) = [event.logprobs for event in events if event.logprobs]
        assert [one.token_id for one in entries.top] == [one.token_id for one in entry.top]
        assert [one.logprob for one in entries.top] == pytest.approx(
            [one.logprob for one in entry.top], abs=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [16, 23, 512])
def test_mixed_and_chunked_is_as_alone(
    lab: Lab, alone: Told, kind: type[CpuRunner], budget: int
) -> None:
    rng = random.Random(budget)
    asked = [*requests(), *(random_request(rng, f"r{i}") for i in range(8))]
    rng.shuffle(asked)
    check(run(lab.engine(kind, max_step_tokens=budget, max_seats=2), asked), alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_the_first_of_several_choices_tells(
    lab: Lab, alone: Told, kind: type[CpuRunner], prefix_cache: bool
) -> None:
    engine = lab.engine(kind, max_step_tokens=24, prefix_cache=prefix_cache)
    check(run(engine, requests(n=3)), alone)
    assert len(engine.ends) == 3 * len(PROMPTS)


@pytest.mark.parametrize("kind", KINDS)
def test_preempted_while_it_is_read(lab: Lab, alone: Told, kind: type[CpuRunner]) -> None:
    talking = [
        make_request([i] * 9, request_id=f"t{i}", max_tokens=60, ignore_eos=True) for i in range(3)
    ]
    lost: list[int] = []
    for num_blocks in (36, 40, 44, 48):
        engine = lab.engine(kind, num_blocks=num_blocks, max_step_tokens=8, max_sequences=8)
        watch(engine.scheduler, lost)
        check(run(engine, [*talking, *requests()]), alone)
        assert all(engine.ends[one.request_id, 0].num_output_tokens == 60 for one in talking)
    assert any(lost)


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_the_same_without(lab: Lab, kind: type[CpuRunner]) -> None:
    found = []
    for num_top in (None, 2):
        engine = lab.engine(kind, max_step_tokens=32)
        run(engine, requests(prompt_logprobs=num_top, max_tokens=8))
        found.append(answers(engine))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3])
def test_a_prompt_alone_is_read_to_its_end_and_nothing_is_generated(
    lab: Lab, alone: Told, kind: type[CpuRunner], n: int
) -> None:
    rng = random.Random(n)
    asked = [*requests(max_tokens=0, n=n), *(random_request(rng, f"r{i}") for i in range(6))]
    rng.shuffle(asked)
    engine = lab.engine(kind, max_step_tokens=24, max_seats=2)
    check(run(engine, asked), alone)

    keys = {(name, index) for name in PROMPTS for index in range(n)}
    for key in keys:
        end = engine.ends[key]
        assert (end.finish_reason, end.num_output_tokens) == ("length", 0)
        assert engine.outputs[key] == [] and engine.text[key] == ""
    assert not any(engine.pool.num_pins(name) for name in lab.weights)


def test_it_may_fill_the_context(lab: Lab) -> None:
    engine = lab.engine(CpuRunner, prefix_cache=False)
    prompt = [i % 200 for i in range(engine.runner.max_len)]
    (told,) = run(engine, [make_request(prompt, prompt_logprobs=0, max_tokens=0)]).values()
    assert [entry.token_id for entry in told] == prompt


@pytest.mark.parametrize("kind", KINDS)
def test_an_abort_while_a_prompt_alone_is_read_frees_all(lab: Lab, kind: type[CpuRunner]) -> None:
    engine = lab.engine(kind, max_step_tokens=4, max_sequences=4)
    prompt, generation = PROMPTS["g1/17"]
    engine.submit(make_request(prompt, generation=generation, max_tokens=0, prompt_logprobs=1))
    while not engine.scheduler.running:
        engine.step()
    (end,) = engine.abort("r")
    engine.run_all()
    engine.close()
    assert end.finish_reason == "abort" and end.prompt_logprobs == ()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_prompt_is_computed_again(lab: Lab, alone: Told, kind: type[CpuRunner]) -> None:
    engine = lab.engine(kind)
    engine.run_all(requests(prompt_logprobs=None))
    engine.ends.clear()
    check(run(engine, requests()), alone)
    assert all(end.num_cached_tokens == 0 for end in engine.ends.values())


def test_ranks_count_what_is_likelier() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, -1.0]])
    own, ranks, ids, best = scores(logits, torch.tensor([2, 1]), 2)
    expected = torch.log_softmax(logits, -1)
    assert ranks.tolist() == [2, 1] and ids[0].tolist() == [1, 2]
    assert torch.allclose(own, expected[[0, 1], [2, 1]])
    assert torch.allclose(best[0], expected[0, [1, 2]])
