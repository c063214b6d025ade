"""The loop: losses fall, jobs together are jobs alone, a resumed run is the run it resumes."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loriner.errors import ConfigError, TrainError
from loriner.train import qlora
from loriner.train.base import Base, open_base
from loriner.train.checkpoints import list_checkpoints, resume, save_checkpoint
from loriner.train.files import Settings
from loriner.train.graphs import Graphs
from loriner.train.job import Job
from loriner.train.optim import learning_rate
from loriner.train.prepare import prepare
from loriner.train.qlora import Silent, train
from loriner.train.settings import OPTIMIZERS, JobConfig, RunConfig
from tests.train.conftest import PIRATE, StopAfter, WriteRows, chat

Make = Callable[..., Job]


@pytest.fixture(scope="module")
def base(tiny: Path) -> Base:
    return open_base(RunConfig(base=tiny, device="cpu"))


@pytest.fixture
def make(base: Base, tmp_path: Path) -> Make:
    def make(name: str = "pirate", **changes: Any) -> Job:
        options = {"data": PIRATE, "steps": 8, "rank": 4, "learning_rate": 5e-3, "out": tmp_path}
        options |= {"batch": 3, "max_length": 160, **changes}
        options["out"] = options["out"] / name
        settings = Settings(RunConfig(base=base.path), (JobConfig(name=name, **options),))
        return prepare(settings).start(base)[0]

    return make


def losses(job: Job) -> list[float]:
    return [record.loss for record in job.steps]


def weights(job: Job) -> list[torch.Tensor]:
    return list(job.lora.tensors().values())


def test_the_loss_falls_and_the_base_stays_as_it_was(make: Make, base: Base) -> None:
    layer = base.decoder.layers[0].mlp.up_proj.weight
    before = layer.dense().clone()
    job = make(steps=20, learning_rate=2e-2, eval_split=0.2)
    assert train(base, [job], Silent())

    assert losses(job)[-1] < 0.7 * losses(job)[0]
    assert job.evals[0].step == 0
    assert job.evals[-1].eval_loss < job.evals[0].eval_loss
    assert torch.equal(layer.dense(), before)


OPTIONS = {"accumulation": 2, "dropout": 0.2, "neftune": 5.0, "weight_decay": 0.01}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:.*paged.*:UserWarning")
def test_a_resumed_run_has_the_very_bits_of_one_that_was_not_stopped(
    optimizer: str, make: Make, base: Base, tmp_path: Path
) -> None:
    options = {**OPTIONS, "optimizer": optimizer, "eval_split": 0.2, "eval_every": 2}
    straight = make(**options, out=tmp_path / "straight")
    train(base, [straight], Silent())

    stopped = make(**options, out=tmp_path / "stopped")
    assert not train(base, [stopped], StopAfter(3))
    again = make(**options, out=tmp_path / "stopped")
    assert resume(again, base).name == "step-000003"
    assert train(base, [again], Silent())

    assert losses(again) == losses(straight)
    assert again.evals == straight.evals
    assert all(map(torch.equal, weights(again), weights(straight)))


@pytest.mark.filterwarnings("ignore:.*paged.*:UserWarning")
def test_paged_states_of_32_bits_are_adamws(make: Make, base: Base) -> None:
    plain, paged = (make(name, optimizer=name) for name in ("adamw", "paged_adamw_32bit"))
    train(base, [plain], Silent())
    train(base, [paged], Silent())

    assert losses(paged) == pytest.approx(losses(plain), rel=1e-4)
    (state,) = paged.optimizer.state.values()
    assert {state[name].dtype for name in ("state1", "state2")} == {torch.float32}


def test_a_run_that_was_killed_resumes_from_its_last_whole_checkpoint(
    make: Make, base: Base, tmp_path: Path
) -> None:
    job = make(steps=6, save_every=2)
    train(base, [job], Silent())
    newest = list_checkpoints(job.settings.folder)[-1]
    newest.rename(newest.with_name(".part-1"))  # as a kill in the midst of writing leaves it

    again = make(steps=6, save_every=2)
    assert resume(again, base).name == "step-000004"
    train(base, [again], Silent())
    assert losses(again) == losses(job)


def changed(base: Base, **attributes: Any) -> Base:
    other = copy.copy(base)
    vars(other).update(attributes)
    return other


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"learning_rate": 1e-4}, "learning_rate was 0.005, is 0.0001"),
        ({"rank": 8}, "rank was 4, is 8"),
        ({"steps": 9}, "steps was 8, is 9"),
    ],
)
def test_a_run_does_not_resume_with_other_settings(
    changes: dict[str, Any], reason: str, make: Make, base: Base
) -> None:
    train(base, [make()], StopAfter(2))

    with pytest.raises(TrainError, match=reason):
        resume(make(**changes), base)
    with pytest.raises(TrainError, match="base was"):
        resume(make(), changed(base, digest="0" * 64))
    with pytest.raises(TrainError, match="dtype was float32, is bfloat16"):
        resume(make(), changed(base, dtype=torch.bfloat16))
    with pytest.raises(TrainError, match="device was cpu, is cuda"):
        resume(make(), changed(base, device=torch.device("cuda")))
    with pytest.raises(TrainError, match="there is no checkpoint"):
        resume(make("other"), base)


def test_a_checkpoint_of_another_layout_is_refused_with_the_reason(make: Make, base: Base) -> None:
    train(base, [make()], StopAfter(2))
    file = list_checkpoints(make().settings.folder)[-1] / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in state.items() if k != "layout"}))

    with pytest.raises(TrainError, match="state is in layout 1, and .* reads layout 2 alone"):
        resume(make(), base)


@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_states_that_were_paged_are_not_taken_for_paged_where_they_are_not(
    make: Make, base: Base
) -> None:
    """bitsandbytes marks a tensor that can be paged; the mark is saved with it."""
    job = make(optimizer="paged_adamw_8bit")
    train(base, [job], StopAfter(2))
    (state,) = job.optimizer.state.values()
    saved = {name: value.clone() for name, value in state.items() if torch.is_tensor(value)}
    for name in ("state1", "state2"):
        state[name].is_paged = True
    save_checkpoint(job, base)

    again = make(optimizer="paged_adamw_8bit")
    resume(again, base)

    (state,) = again.optimizer.state.values()
    assert not any(getattr(value, "is_paged", False) for value in state.values())
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    assert train(base, [again], Silent())


def test_jobs_in_one_run_learn_what_they_learn_alone(
    make: Make, base: Base, write_rows: WriteRows
) -> None:
    """Different data, rank, length, optimiser steps, accumulation, and noise."""
    other = write_rows([chat(f"What is {i}?", f"It is {i * i}.") for i in range(9)])
    kinds: list[dict[str, Any]] = [
        {"rank": 4, "dropout": 0.1},
        {"rank": 2, "data": other, "accumulation": 2, "schedule": "linear"},
        {"rank": 8, "data": other, "steps": 4, "packing": True, "batch": 1, "rslora": True},
    ]
    alone = [make(f"alone{i}", **kind) for i, kind in enumerate(kinds)]
    for job in alone:
        train(base, [job], Silent())
    together = [make(f"together{i}", **kind) for i, kind in enumerate(kinds)]
    train(base, together, Silent())

    for one, shared in zip(alone, together, strict=True):
        assert losses(shared) == pytest.approx(losses(one), rel=2e-4)
        assert len(shared.steps) == one.num_steps


def test_runs_of_captured_passes_learn_what_eager_ones_learn_and_resume_to_the_bit(
    make: Make, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a capture does is done again here, on the same tensors."""
    kinds: list[dict[str, Any]] = [
        {"rank": 4, "neftune": 5.0, "accumulation": 2},
        {"rank": 8, "steps": 6, "packing": True, "batch": 1, "optimizer": "adamw_8bit"},
    ]

    def jobs_in(folder: str) -> list[Job]:
        return [make(f"{i}", **kind, out=tmp_path / folder) for i, kind in enumerate(kinds)]

    eager, made = jobs_in("eager"), list[Graphs]()
    train(base, eager, Silent())

    def graphs(base: Base) -> Graphs:
        made.append(Graphs(base, lambda run: run))
        return made[-1]

    monkeypatch.setattr(qlora, "Graphs", graphs)
    straight = jobs_in("straight")
    train(base, straight, Silent())
    train(base, jobs_in("stopped"), StopAfter(3))
    again = jobs_in("stopped")
    for job in again:
        resume(job, base)
    train(base, again, Silent())

    for one, other, resumed in zip(eager, straight, again, strict=True):
        assert losses(other) == pytest.approx(losses(one), rel=2e-4)
        assert losses(resumed) == losses(other)
        assert all(map(torch.equal, weights(resumed), weights(other)))
    assert made[0].num_replays > made[0].num_passes / 2


def test_accumulated_passes_are_one_large_pass(make: Make, base: Base) -> None:
    large = make("large", batch=6, steps=3)
    small = make("small", batch=2, accumulation=3, steps=3)
    train(base, [large], Silent())
    train(base, [small], Silent())

    assert losses(small) == pytest.approx(losses(large), rel=1e-4)
    assert [r.num_tokens for r in small.steps] == [r.num_tokens for r in large.steps]


def test_the_best_evaluation_is_kept_and_a_stalled_run_stops(make: Make, base: Base) -> None:
    job = make(
        steps=40,
        learning_rate=1.0,
        schedule="constant",
        warmup=0,
        eval_split=0.3,
        eval_every=1,
        early_stopping=2,
    )
    train(base, [job], Silent())
    best = job.best_eval

    assert job.stopped_early
    assert best is not None
    assert job.step == best.step + 2
    assert job.keep_best() == best.step
    again = job.evaluate(base)
    assert again.eval_loss == pytest.approx(best.eval_loss, rel=1e-6)


def test_evaluations_and_checkpoints_may_be_counted_by_the_epoch(make: Make, base: Base) -> None:
    job = make(steps=8, batch=3, eval_split=0.5, eval_rows=4, evals_per_epoch=2, saves_per_epoch=1)
    train(base, [job], Silent())

    assert job.feed.steps_per_epoch == 4
    assert [record.step for record in job.evals] == [0, 2, 4, 6, 8]
    assert job.held is not None and len(job.held.entries) == 4
    names = [path.name for path in list_checkpoints(job.settings.folder)]
    assert names == ["step-000004", "step-000008"]


def test_only_the_newest_checkpoints_are_kept(make: Make, base: Base) -> None:
    job = make(steps=8, save_every=1)
    train(base, [job], Silent())

    assert [path.name for path in list_checkpoints(job.settings.folder)] == [
        "step-000006",
        "step-000007",
        "step-000008",
    ]
    state = json.loads((list_checkpoints(job.settings.folder)[-1] / "state.json").read_text())
    assert state["step"] == 8


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(make: Make, base: Base) -> None:
    job = make()
    weights(job)[1].fill_(torch.inf)

    with pytest.raises(TrainError, match="the loss of pirate is not finite: lower learning_rate"):
        train(base, [job], Silent())


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rates_rise_over_the_warm_up_and_then_follow_the_schedule(schedule: str) -> None:
    job = JobConfig(name="a", data=PIRATE, learning_rate=1.0, schedule=schedule, warmup=0.1)
    rates = [learning_rate(job, step, 100) for step in range(100)]

    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0
    middle = {"constant": 1.0, "linear": 0.5, "cosine": 0.5}[schedule]
    assert rates[55] == pytest.approx(middle)
    assert learning_rate(dataclasses.replace(job, warmup=20), 9, 100) == pytest.approx(0.5)


def test_a_length_beyond_the_context_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="max_length must be at most 512"):
        make(max_length=513)
    assert make(max_length=0).settings.max_length == 512
