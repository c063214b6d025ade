"""The loop that benchmarks drive: what it counts, on a runner that answers at once and on a late
one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loriner.bench import drive
from loriner.bench.base_folder import write_base
from loriner.bench.random_adapters import RandomAdapters
from loriner.bench.random_base import RandomBase
from loriner.bench.streams import Streams
from loriner.bench.target import Need, Target
from loriner.core import Event, FinishReason
from loriner.engine.cpu_runner import CpuRunner
from loriner.errors import EngineFailedError
from tests.engines import LateRunner, WatchedEngine, engine_config

ADAPTERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("base") / "tiny"
    write_base(RandomBase("tiny"), target)
    return target


@pytest.fixture
def target() -> Iterator[Target]:
    base = RandomBase("tiny")
    adapters = RandomAdapters(base.config, (4,))
    made = Target(base, adapters, Need(4, 128, [adapters.num_bytes(0)] * ADAPTERS), 1)
    yield made
    made.close()


@pytest.mark.parametrize("runner_class", [CpuRunner, LateRunner])
def test_full_steps_are_those_in_which_every_row_gets_a_token(
    folder: Path, runner_class: type[CpuRunner]
) -> None:
    config = engine_config(folder)
    runner = runner_class(config)
    adapters = RandomAdapters(runner.model_config, (4,))
    engine = WatchedEngine(config, runner, lambda g: runner.pack(adapters.load(g)))
    prompts = drive.Prompts(runner.model_config.vocab_size)
    drive.warm(engine, prompts, map(adapters.generation, (0, 1)))
    asked = drive.requests(prompts, [0, 1, -1], adapters.generation, prompt_len=5, max_tokens=9)
    trace = drive.run(engine, asked)
    engine.close()

    assert trace.num_tokens == 27
    assert len(trace.full) == 9 and len(trace.gaps) == 8
    assert trace.contexts == [5.0 + i for i in range(9)]
    assert trace.first.keys() == {"row-0", "row-1", "row-2"}
    assert trace.begun < min(trace.first.values()) <= trace.ended


def test_a_target_runs_the_engine_on_a_base_without_files(target: Target) -> None:
    prompts = drive.Prompts(target.vocab_size)
    drive.warm(target.engine, prompts, map(target.adapters.generation, (0, 1)))
    asked = drive.requests(prompts, [0, 1, 1], target.adapters.generation, 6, 4)
    trace = drive.run(target.engine, asked)
    step = target.last_step

    assert trace.num_tokens == 12
    assert step is not None and step.num_rows == 3
    assert step.context.tolist() == [9, 9, 9]  # 6, and 3 tokens that were fed back
    assert target.watch.median_ms(target.again(step), repeats=3) > 0
    target.engine.check_integrity()


def test_streams_go_on_while_others_are_asked(target: Target) -> None:
    generations = list(map(target.adapters.generation, (0, 1)))
    streams = Streams(target, generations, 8)
    gaps: list[float] = []
    with streams.gaps_into(gaps):
        streams.run(5)
        streams.ask(target.adapters.generation(2), 8)
    seen = len(gaps)
    streams.run(3)

    assert 4 <= seen == len(gaps)
    assert target.engine.has_work
    assert streams.has_room() is (streams.left > 64) and not streams.has_room(streams.left - 64)
    streams.close()
    assert not target.engine.has_work
    target.engine.check_integrity()


def test_a_failed_row_stops_the_benchmark() -> None:
    failed = Event("row-0", 0, finish_reason=FinishReason.ERROR, error="The engine failed.")

    with pytest.raises(EngineFailedError, match=r"The engine failed\."):
        drive.note(drive.Trace(), [failed], 1)


def test_prompts_are_all_different_and_hold_no_special_tokens() -> None:
    prompts = drive.Prompts(512, seed=1)
    made = [prompts.one(8) for _ in range(50)]

    assert len(set(made)) == 50
    assert all(259 <= token < 512 for prompt in made for token in prompt)
    assert drive.Prompts(512, seed=1).one(8) == made[0]
