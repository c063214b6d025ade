"""Embeddings in the engine: one vector for a prompt, whatever runs beside it, however it is cut."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from loriner.adapters.pool import SeatWeights
from loriner.core import FinishReason, Request, Sequence
from loriner.engine.cpu_runner import CpuRunner
from loriner.engine.device_steps import Limits
from loriner.engine.scheduler import Scheduler
from loriner.model.transformer import KvCache
from tests.e2e.test_neighbours import random_adapters
from tests.engine.test_device_steps import DeviceLikeRunner
from tests.engine.test_pipeline import random_request
from tests.engines import LateRunner, WatchedEngine, build_engine, engine_config
from tests.fakes import make_request
from tests.tiny import write_tiny_base

BLOCK = 4
KINDS = (CpuRunner, LateRunner, DeviceLikeRunner)
PROMPTS = {
    f"{generation}/{size}": ([(7 * i + size) % 256 for i in range(size)], generation)
    for generation in (None, "g0", "g1", "g3")
    for size in (1, 4, 17, 60)
}


class Lab:
    """A tiny base on each kind of runner, and adapters for it."""

    def __init__(self, folder: Path) -> None:
        self.base = write_tiny_base(folder / "base")
        self.runners = {kind: kind(engine_config(self.base)) for kind in KINDS}
        self.weights: Mapping[str, SeatWeights] = random_adapters(self.runners[CpuRunner])
        self.alone: dict[str, NDArray[np.float32]] = {}
        for name, request in self.requests().items():
            engine = self.engine(CpuRunner, prefix_cache=False)
            engine.run_all([request])
            self.alone[name] = vectors(engine)[name]

    def requests(self) -> dict[str, Request]:
        return {
            name: make_request(prompt, request_id=name, generation=generation, embeds=True)
            for name, (prompt, generation) in PROMPTS.items()
        }

    def engine(self, kind: type[CpuRunner], num_blocks: int = 256, **config: Any) -> WatchedEngine:
        runner = self.runners[kind]
        runner.kv = KvCache(runner.model_config, num_blocks, BLOCK, torch.float32)
        runner.max_len = min(128, num_blocks * BLOCK)
        made = engine_config(self.base, block_size=BLOCK, **config)
        if isinstance(runner, LateRunner):
            runner.reset()
        if isinstance(runner, DeviceLikeRunner):
            runner.begin(Limits(made.max_step_tokens, made.max_sequences, runner.max_len, BLOCK))
        return build_engine(made, self.weights, runner)


def vectors(engine: WatchedEngine) -> dict[str, NDArray[np.float32]]:
    return {
        end.request_id: np.frombuffer(end.embedding, "<f4")
        for end in engine.ends.values()
        if end.embedding
    }


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("embeddings"))


def test_a_vector_has_length_one_and_says_what_was_read(lab: Lab) -> None:
    engine = lab.engine(CpuRunner)
    engine.run_all([lab.requests()["g1/17"]])
    end = engine.ends["g1/17", 0]
    vector = vectors(engine)["g1/17"]

    assert vector.shape == (engine.runner.model_config.hidden_size,)
    assert np.linalg.norm(vector) == pytest.approx(1.0)
    assert (end.finish_reason, end.token_ids, end.text) == (FinishReason.STOP, (), "")
    assert (end.num_prompt_tokens, end.num_output_tokens) == (17, 0)
    assert engine.counters.num_prompt_tokens == 17 and engine.counters.num_output_tokens == 0


def test_each_prompt_and_each_adapter_has_its_own(lab: Lab) -> None:
    made = list(lab.alone.values())
    nearest = max(float(one @ other) for i, one in enumerate(made) for other in made[:i])
    assert nearest < 0.9999


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [16, 23, 512])
def test_mixed_and_chunked_is_as_alone(lab: Lab, kind: type[CpuRunner], budget: int) -> None:
    rng = random.Random(budget)
    requests = [*lab.requests().values(), *(random_request(rng, f"r{i}") for i in range(8))]
    rng.shuffle(requests)
    engine = lab.engine(kind, max_step_tokens=budget, max_seats=2)
    engine.run_all(requests)
    engine.close()

    check(engine, lab)
    assert len({key[0] for key in engine.ends}) == len(requests)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_blocks_are_written_and_not_read(lab: Lab, kind: type[CpuRunner]) -> None:
    engine = lab.engine(kind)
    for _ in range(2):
        engine.ends.clear()
        engine.run_all(lab.requests().values())
        check(engine, lab)
    assert all(end.num_cached_tokens == 0 for end in engine.ends.values())

    prompt, generation = PROMPTS["g1/60"]
    engine.run_all([make_request(prompt, request_id="text", generation=generation)])
    engine.close()
    assert engine.ends["text", 0].num_cached_tokens == 56


@pytest.mark.parametrize("kind", KINDS)
def test_preempted_while_it_is_read(lab: Lab, kind: type[CpuRunner]) -> None:
    talking = [
        make_request([i] * 9, request_id=f"t{i}", max_tokens=60, ignore_eos=True) for i in range(3)
    ]
    lost: list[int] = []  # tokens that were read of prompts whose blocks were then taken
    for num_blocks in (36, 40, 44, 48):
        engine = lab.engine(kind, num_blocks=num_blocks, max_step_tokens=8, max_sequences=8)
        watch(engine.scheduler, lost)
        engine.run_all([*talking, *lab.requests().values()])
        engine.close()
        check(engine, lab)
        assert all(engine.ends[one.request_id, 0].num_output_tokens == 60 for one in talking)
    assert any(lost)


def watch(scheduler: Scheduler, lost: list[int]) -> None:
    preempt = scheduler._preempt

    def watched(sequence: Sequence) -> None:
        if sequence.reading is not None:
            lost.append(sequence.reading.num_read)
        preempt(sequence)

    scheduler._preempt = watched  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", KINDS)
def test_an_aborted_one_leaves_nothing(lab: Lab, kind: type[CpuRunner]) -> None:
    engine = lab.engine(kind, max_step_tokens=16)
    requests = lab.requests()
    engine.submit(requests["None/60"])
    engine.step()
    engine.step()
    (end,) = engine.abort("None/60")
    assert (end.finish_reason, end.embedding) == (FinishReason.ABORT, b"")
    engine.run_all([requests["g1/60"]])
    engine.close()
    assert np.allclose(vectors(engine)["g1/60"], lab.alone["g1/60"], atol=1e-5)


def test_a_model_that_is_not_finite_fails_the_request_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = lab.engine(CpuRunner)
    requests = lab.requests()
    model = lab.runners[CpuRunner].model
    normed = type(model).normed

    def broken(self: Any, h: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        made = normed(self, h, rows)
        return made * torch.inf if len(rows) == 17 else made

    monkeypatch.setattr(type(model), "normed", broken)
    engine.run_all([requests["g1/17"], requests["g1/60"]])
    assert engine.ends["g1/17", 0].error_kind == "EngineFailedError"
    assert np.allclose(vectors(engine)["g1/60"], lab.alone["g1/60"], atol=1e-5)
    prompt, generation = PROMPTS["g1/17"]
    engine.run_all([make_request(prompt, request_id="text", generation=generation)])
    assert engine.ends["text", 0].num_cached_tokens == 0, "broken blocks were left findable"


def check(engine: WatchedEngine, lab: Lab) -> None:
    made = vectors(engine)
    assert made.keys() == lab.alone.keys()
    for name, vector in made.items():
        assert np.allclose(vector, lab.alone[name], atol=1e-5), name
