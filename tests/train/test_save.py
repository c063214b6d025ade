"""Finished adapters: what PEFT and the server read from them, and what stands beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loriner.adapters import formats
from loriner.train import canaries, gate
from loriner.train.answers import Question, answer
from loriner.train.base import Base, open_base
from loriner.train.files import Settings
from loriner.train.job import Job
from loriner.train.passes import Share, run_pass
from loriner.train.prepare import Preparation, prepare
from loriner.train.qlora import Silent, train
from loriner.train.save import Finished, finish
from loriner.train.settings import JobConfig, RunConfig
from tests.train.conftest import PIRATE
from tests.train.peft_oracle import dense_model, quiet


class Run:
    """One trained adapter and all that it was made with."""

    def __init__(self, tiny: Path, folder: Path, **options: Any) -> None:
        self.base: Base = open_base(RunConfig(base=tiny, device="cpu"))
        job = JobConfig(name="acme/pirate", data=PIRATE, out=folder, **options)
        self.preparation: Preparation = prepare(Settings(RunConfig(base=tiny), (job,)))
        self.job: Job = self.preparation.start(self.base)[0]
        train(self.base, [self.job], Silent())
        tools = self.preparation.masker, self.preparation.tokenizer
        self.finished: Finished = finish(self.job, self.base, *tools, "loriner train --seed 0")


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    options = {"steps": 6, "rank": 4, "alpha": 8, "learning_rate": 1e-2, "eval_split": 0.2}
    yield Run(tiny, tmp_path_factory.mktemp("run"), batch=3, sample_tokens=8, **options)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_saved_opens_in_peft_with_equal_logits(
    rslora: bool, tiny: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    options: dict[str, Any] = {"rslora": rslora, "target_modules": "q_proj,down_proj"}
    run = Run(tiny, tmp_path, steps=2, rank=3, learning_rate=1e-2, samples=0, **options)
    with quiet():
        model = PeftModel.from_pretrained(dense_model(tiny), run.finished.folder)
    (document, *_) = run.job.data.documents
    ids = torch.tensor([document.token_ids])
    labels = torch.where(torch.tensor([document.is_learnt]), ids, -100)
    with torch.no_grad():
        _, (losses,) = run_pass(run.base, [Share([document], run.job.lora)])
        theirs = model(input_ids=ids, labels=labels).loss

    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    config = json.loads((run.finished.folder / "adapter_config.json").read_text())
    assert set(config) == set(model.peft_config["default"].to_dict())


def test_what_is_saved_is_what_the_server_reads(run: Run) -> None:
    modules = run.base.config.modules()
    adapter = formats.load(run.finished.folder, modules, base_digest=run.base.digest)

    assert adapter.base_digest == run.base.digest
    for name, (a, b) in run.job.lora.weights.items():
        assert torch.equal(adapter.modules[name].a, a)
        assert torch.equal(adapter.modules[name].b, b)
        assert adapter.modules[name].scaling == run.job.lora.scaling


def test_the_card_says_what_it_was_made_of_and_how_well_it_went(run: Run) -> None:
    card = (run.finished.folder / "README.md").read_text()

    assert card.startswith('---\nbase_model: "tiny"\nlibrary_name: peft\n')
    for text in (
        run.base.digest,
        run.job.data.digest,
        "| rank | 4 |",
        "| 0 (base) |",
        "loriner train --seed 0",
        "Gate passed: eval loss",
        "## Samples",
    ):
        assert text in card
    assert (run.finished.folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_samples_are_answers_of_base_and_adapter(run: Run) -> None:
    assert len(run.finished.samples) == 3
    assert all(sample.wanted.startswith("Arrr") for sample in run.finished.samples)


def test_greedy_answers_are_those_of_transformers_and_peft(run: Run, tiny: Path) -> None:
    from peft import PeftModel

    with quiet():
        model = PeftModel.from_pretrained(dense_model(tiny), run.finished.folder)
    prompts = [[65 + i for i in range(length)] for length in (3, 9, 5)]
    questions = [Question(p, lora) for p in prompts for lora in (run.job.lora, None)]
    answers = answer(run.base, questions, 6, ignore_eos=True)

    for question, given in zip(questions, answers, strict=True):
        ids = [*question.prompt_ids, *given.token_ids]
        with torch.no_grad():
            if question.lora is None:
                with model.disable_adapter():
                    logits = model(torch.tensor([ids])).logits[0]
            else:
                logits = model(torch.tensor([ids])).logits[0]
        expected = logits[len(question.prompt_ids) - 1 : -1].log_softmax(-1)
        assert expected.argmax(-1).tolist() == given.token_ids
        values = torch.tensor([[value for _, value in top] for top in given.top])
        torch.testing.assert_close(expected.topk(5).values, values, rtol=1e-4, atol=1e-4)


def test_canaries_and_gate_come_back_as_they_were_written(run: Run) -> None:
    read = canaries.read(run.finished.folder)

    assert (read.base_digest, read.dtype, len(read.canaries)) == (run.base.digest, "float32", 4)
    assert all(len(canary.token_ids) == 8 for canary in read.canaries)
    assert gate.read(run.finished.folder) == run.finished.gate
    assert run.finished.gate.passed


def test_without_held_out_data_the_gate_does_not_pass(tiny: Path, tmp_path: Path) -> None:
    run = Run(tiny, tmp_path, steps=1, samples=0, canaries=0)

    assert not run.finished.gate.passed
    assert "no held-out data" in run.finished.gate.line()


def test_an_exact_gate_compares_answers(tiny: Path, tmp_path: Path) -> None:
    run = Run(tiny, tmp_path, steps=1, eval_split=0.1, gate="exact", gate_rows=2, samples=0)

    assert (run.finished.gate.base, run.finished.gate.adapter) == (0.0, 0.0)
    assert not run.finished.gate.passed
    assert "exact 0.0% of 2 held-out rows" in run.finished.gate.line()
