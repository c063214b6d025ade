"""A run on a shared device rests after all that it computes: training, evaluations, the gate,
samples, canaries. Time is counted in calls of the decoder, one second each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from loriner.train import answers
from loriner.train.answers import Question, answer
from loriner.train.base import Base, open_base
from loriner.train.files import Settings
from loriner.train.gate import judge
from loriner.train.job import Job
from loriner.train.pace import Pace
from loriner.train.passes import mean_loss
from loriner.train.prepare import Preparation, prepare
from loriner.train.qlora import Silent, train
from loriner.train.recording import record
from loriner.train.samples import take_samples
from loriner.train.save import finish
from loriner.train.settings import JobConfig, RunConfig
from tests.train.conftest import PIRATE

DUTY = 0.25
REST = 3.0  # after each second


class Spent:
    """What a base did, in its order: seconds of its calls, and those of its rests as negative."""

    def __init__(self) -> None:
        self.now = 0.0
        self.told: list[float] = []
        self.sizes: list[tuple[int, ...]] = []  # of what each call read

    def compute(self, module: Any, args: Any, given: dict[str, Any]) -> None:
        ids = given.get("input_ids", given.get("inputs_embeds"))
        self.sizes.append(tuple(ids.shape[:2]))
        self.now += 1.0
        self.told.append(1.0)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.told.append(-seconds)

    def clear(self) -> None:
        self.told.clear()
        self.sizes.clear()


@contextmanager
def watched(base: Base, duty: float) -> Iterator[tuple[Base, Spent]]:
    """The same base on a clock that its decoder alone moves."""
    spent, shared = Spent(), copy.copy(base)
    shared.pace = Pace(base.device, duty, clock=lambda: spent.now, sleep=spent.sleep)
    hook = base.decoder.register_forward_pre_hook(spent.compute, with_kwargs=True)
    try:
        yield shared, spent
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def base(tiny: Path) -> Base:
    return open_base(RunConfig(base=tiny, device="cpu"))


@pytest.fixture
def preparation(base: Base, tmp_path: Path) -> Preparation:
    options: dict[str, Any] = {"steps": 4, "batch": 3, "accumulation": 2, "max_length": 160}
    options |= {"rank": 2, "eval_split": 0.5, "eval_every": 2, "gate": "exact", "gate_rows": 3}
    job = JobConfig(name="pirate", data=PIRATE, out=tmp_path, sample_tokens=6, **options)
    return prepare(Settings(RunConfig(base=base.path), (job,)))


@pytest.fixture
def job(preparation: Preparation, base: Base) -> Job:
    (made,) = preparation.start(base)
    return made


def test_passes_and_evaluations_rest_each(job: Job, base: Base) -> None:
    with watched(base, DUTY) as (shared, spent):
        assert train(shared, [job], Silent())
        num_calls = len(spent.told) // 2

        assert [record.step for record in job.evals] == [0, 2, 4]
        assert spent.told == [1.0, -REST] * num_calls
        assert num_calls == 4 * 2 + 3  # passes of the steps, and an evaluation in one batch each


def test_an_evaluation_rests_after_each_of_its_batches(job: Job, base: Base) -> None:
    assert job.held is not None
    longest = max(len(document.token_ids) for document in job.held.documents)
    with watched(base, DUTY) as (shared, spent):
        mean_loss(shared, job.lora, job.held.documents, max_tokens=longest)

        assert spent.told == [1.0, -REST] * len(spent.sizes)
        assert len(spent.sizes) > 1
        assert all(tokens <= longest for _, tokens in spent.sizes)


Phase = Callable[[Job, Base, Preparation], object]
PHASES: dict[str, Phase] = {
    "gate": lambda job, base, made: judge(job, base, made.masker, made.tokenizer),
    "samples": lambda job, base, made: take_samples(job, base, made.masker, made.tokenizer),
    "canaries": lambda job, base, made: record(
        base, job.lora, made.masker, made.tokenizer, job.data.prompts, job.settings.canaries
    ),
    "all that finishes a job": lambda job, base, made: finish(
        job, base, made.masker, made.tokenizer, "loriner train"
    ),
}


@pytest.mark.parametrize("phase", PHASES)
def test_every_token_of_an_answer_is_rested_from(
    phase: str, job: Job, base: Base, preparation: Preparation
) -> None:
    with watched(base, DUTY) as (shared, spent):
        PHASES[phase](job, shared, preparation)

        assert len(spent.sizes) >= 6  # of a sample; canaries and the gate ask for more tokens
        assert spent.told == [1.0, -REST] * len(spent.sizes)


PROMPTS = ([5, 6, 7], [9] * 20, [40, 41, 42, 43, 44, 45, 46], [1])


def test_prompts_are_read_in_pieces_where_others_wait(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [Question(prompt, None) for prompt in PROMPTS]
    whole = answer(base, asked, 5, ignore_eos=True)
    monkeypatch.setattr(answers, "TURN_TOKENS", 4 * 6)
    with watched(base, DUTY) as (shared, spent):
        pieces = answer(shared, asked, 5, ignore_eos=True)

        assert spent.sizes == [(4, 6)] * 3 + [(4, 2)] + [(4, 1)] * 4
        assert spent.told == [1.0, -REST] * 8
    for found, expected in zip(pieces, whole, strict=True):
        assert found.token_ids == expected.token_ids
        for top, other in zip(found.top, expected.top, strict=True):
            assert [p for _, p in top] == pytest.approx([p for _, p in other], abs=1e-3)


def test_a_run_with_all_of_the_device_neither_rests_nor_cuts_its_prompts(
    job: Job, base: Base, preparation: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "TURN_TOKENS", 8)
    with watched(base, 1.0) as (shared, spent):
        train(shared, [job], Silent())
        finish(job, shared, preparation.masker, preparation.tokenizer, "loriner train")
        spent_training = list(spent.told)
        spent.clear()
        answer(shared, [Question(prompt, None) for prompt in PROMPTS], 2, ignore_eos=True)

        assert set(spent_training) == {1.0}
        assert spent.sizes == [(4, 20), (4, 1)]


def test_the_duty_of_a_run_is_its_bases_pace(tiny: Path) -> None:
    assert open_base(RunConfig(base=tiny, device="cpu", duty=0.5)).pace.is_shared
    assert not open_base(RunConfig(base=tiny, device="cpu")).pace.is_shared


def test_a_turn_that_fails_is_not_rested_from(base: Base) -> None:
    spent = Spent()
    pace = Pace(base.device, DUTY, clock=lambda: spent.now, sleep=spent.sleep)
    with pytest.raises(ZeroDivisionError), pace.turn():
        raise ZeroDivisionError
    assert spent.told == []


def test_a_turn_lasts_until_the_device_is_through(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = Spent()

    def wait(device: torch.device) -> None:
        spent.now += 5.0

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    pace = Pace(torch.device("cuda"), 0.5, clock=lambda: spent.now, sleep=spent.sleep)
    with pace.turn():
        spent.now += 1.0
    assert spent.told == [-6.0]
