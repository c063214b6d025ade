"""Order and neighbours don't matter: whatever is mixed, aborted, loaded and evicted around it, a
finished sequence has the tokens it has when it runs alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loriner.adapters.adapter import Adapter, LoraWeight
from loriner.adapters.pool import SeatWeights, pack
from loriner.core import FinishReason, Request
from loriner.engine.cpu_runner import CpuRunner
from loriner.model.transformer import KvCache, layout
from tests.engines import LateRunner, WatchedEngine, build_engine, engine_config
from tests.fakes import make_request
from tests.tiny import write_tiny_base

RANKS = (1, 4, 8, 24, 64)
BLOCK = 4


@dataclass(frozen=True)
class Ask:
    """What one request is; its tokens alone are a function of this."""

    prompt_seed: int
    prompt_len: int
    adapter: int | None
    max_tokens: int
    temperature: float
    n: int
    tenant: str = ""

    def request(self, request_id: str) -> Request:
        generator = torch.Generator().manual_seed(self.prompt_seed)
        prompt = torch.randint(0, 256, (self.prompt_len,), generator=generator).tolist()
        return make_request(
            prompt,
            request_id=request_id,
            generation=None if self.adapter is None else f"g{self.adapter}",
            salt=self.tenant,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.prompt_seed,
            n=self.n,
            ignore_eos=True,
        )


class Lab:
    """One tiny base, five adapters, and what each request answers when it is alone."""

    def __init__(self, folder: Path) -> None:
        self.base = write_tiny_base(folder / "base")
        self.runner = CpuRunner(engine_config(self.base))
        self.late_runner = LateRunner(engine_config(self.base))
        self.weights = random_adapters(self.runner)
        self.alone = cache(self._alone)

    def engine(
        self,
        *,
        num_blocks: int = 256,
        prefix_cache: bool = True,
        late: bool = False,
        **config: int,
    ) -> WatchedEngine:
        runner = self.late_runner if late else self.runner
        runner.kv = KvCache(runner.model_config, num_blocks, BLOCK, torch.float32)
        runner.max_len = num_blocks * BLOCK
        made = engine_config(self.base, block_size=BLOCK, prefix_cache=prefix_cache, **config)
        return build_engine(made, self.weights, runner)

    def _alone(self, ask: Ask) -> list[list[int]]:
        engine = self.engine(prefix_cache=False)
        engine.run_all([ask.request("r")])
        engine.close()
        return [engine.outputs["r", i] for i in range(ask.n)]


def random_adapters(runner: CpuRunner) -> Mapping[str, SeatWeights]:
    generator = torch.Generator().manual_seed(3)
    modules, placed = runner.model_config.modules(), layout(runner.model_config)
    made = {}
    for i, rank in enumerate(RANKS):
        weights = {
            name: LoraWeight(
                torch.randn(rank, inputs, generator=generator) / inputs**0.5,
                torch.randn(outputs, rank, generator=generator) * 0.2,
                None,
                1.0,
            )
            for name, (outputs, inputs) in modules.items()
            if name.startswith("model.layers") and (i % 2 or "proj" in name and "mlp" not in name)
        }
        made[f"g{i}"] = pack(Adapter.of(weights), placed, torch.float32)
    return made


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("neighbours"))


asks = st.builds(
    Ask,
    prompt_seed=st.integers(0, 5),
    prompt_len=st.integers(1, 30),
    adapter=st.none() | st.integers(0, len(RANKS) - 1),
    max_tokens=st.integers(1, 10),
    temperature=st.sampled_from([0.0, 1.0]),
    n=st.sampled_from([1, 1, 1, 2]),
    tenant=st.sampled_from(["", "", "", "other"]),
)
actions = st.one_of(
    st.tuples(st.just("submit"), asks),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("evict"), st.integers(0, len(RANKS) - 1)),
)


@settings(
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    script=st.lists(actions, min_size=4, max_size=30),
    num_blocks=st.sampled_from([24, 40, 256]),
    max_step_tokens=st.sampled_from([5, 16, 512]),
    max_sequences=st.sampled_from([2, 4, 16]),
    max_seats=st.sampled_from([1, 2, 8]),
    prefix_cache=st.booleans(),
    late=st.booleans(),
)
def test_a_sequence_has_the_tokens_it_has_alone(
    lab: Lab,
    script: list[tuple[str, object]],
    num_blocks: int,
    max_step_tokens: int,
    max_sequences: int,
    max_seats: int,
    prefix_cache: bool,
    late: bool,
) -> None:
    engine = lab.engine(
        num_blocks=num_blocks,
        prefix_cache=prefix_cache,
        late=late,
        max_step_tokens=max_step_tokens,
        max_sequences=min(max_sequences, max_step_tokens),
        max_seats=max_seats,
    )
    submitted: list[Ask] = []
    for action, value in script:
        if action == "submit":
            assert isinstance(value, Ask)
            engine.submit(value.request(str(len(submitted))))
            submitted.append(value)
        elif action == "step":
            assert isinstance(value, int)
            for _ in range(value):
                engine.step()
        elif action == "abort" and submitted:
            assert isinstance(value, int)
            engine.note(engine.abort(str(value % len(submitted))))
        elif action == "evict":
            engine.registry.evict(f"g{value}")
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    engine.close()
    for i, ask in enumerate(submitted):
        for choice in range(ask.n):
            end = engine.ends[str(i), choice]
            if end.finish_reason is FinishReason.ABORT:
                continue
            assert end.finish_reason is FinishReason.LENGTH
            assert engine.outputs[str(i), choice] == lab.alone(ask)[choice], (i, ask)


def test_adapters_change_the_answer_or_the_test_above_proves_nothing(lab: Lab) -> None:
    answers = {
        tuple(lab.alone(Ask(1, 12, adapter, 10, 0.0, 1))[0])
        for adapter in (None, *range(len(RANKS)))
    }
    assert len(answers) == len(RANKS) + 1


def test_one_broken_step_fails_its_own_sequences_only(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    engine = lab.engine()
    engine.submit(Ask(0, 5, 0, 8, 0.0, 1).request("lost"))
    while not engine.outputs.get(("lost", 0)):
        engine.step()
    run, lab.runner.run = lab.runner.run, broken_run  # type: ignore[method-assign, assignment]
    engine.step()
    lab.runner.run = run  # type: ignore[method-assign]
    after = Ask(0, 5, 1, 8, 0.0, 1)
    engine.run_all([after.request("after")])
    engine.close()
    assert engine.ends["lost", 0].finish_reason is FinishReason.ERROR
    assert "secret" not in str(engine.ends["lost", 0].error)
    assert engine.outputs["after", 0] == lab.alone(after)[0]


def broken_run(batch: object) -> torch.Tensor:
    raise RuntimeError("secret internals")


def test_an_adapter_that_makes_nan_ends_its_own_rows_only(lab: Lab) -> None:
    engine = lab.engine()
    good = Ask(2, 9, 1, 8, 0.0, 1)
    poisoned = dict(lab.weights)
    groups = {
        key: group._replace(a=group.a * torch.nan)
        for key, group in lab.weights["g0"].groups.items()
    }
    poisoned["g0"] = SeatWeights(groups, None, lab.weights["g0"].num_bytes)
    engine.registry.loaders.source = poisoned.__getitem__
    engine.run_all([Ask(2, 9, 0, 8, 0.0, 1).request("bad"), good.request("good")])
    engine.close()
    assert engine.ends["bad", 0].finish_reason is FinishReason.ERROR
    assert engine.outputs["good", 0] == lab.alone(good)[0]
