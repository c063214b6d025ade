"""What 4-bit costs, on the tiny base: every variant is trained and scored; the table; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loriner.bench.cost import KEYS, VARIANTS
from loriner.bench.cost_case import main as run_case
from loriner.bench.dense_base import DENSE, NF4, NF4_DOUBLE, Bases, make_bases, weight_error
from loriner.bench.full import FullModel
from loriner.cli import main
from loriner.model.weights import Checkpoint
from loriner.train.base import open_base
from loriner.train.masks import Document
from loriner.train.passes import Share, run_pass
from loriner.train.settings import RunConfig
from tests.tiny import write_tiny_base, write_tiny_dense

PIRATE = Path(__file__).resolve().parents[1] / "data" / "train" / "pirate.jsonl"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dense(tmp_path_factory.mktemp("cost") / "source")


@pytest.fixture(scope="module")
def bases(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return make_bases(dense, tmp_path_factory.mktemp("bases"))


def rows(path: Path, count: int, answer: str) -> Path:
    """Questions that differ, all with one answer."""
    turns = [("user", "question {}"), ("assistant", answer)]
    lines = [
        json.dumps({"messages": [{"role": r, "content": c.format(i)} for r, c in turns]})
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def case(variant: str, bases: Bases, data: Path, **settings: Any) -> dict[str, Any]:
    (of,) = (v for v in VARIANTS if v.key == variant)
    job = {"variant": variant, "base": str(bases.folders[of.base]), "test": str(data)}
    job |= {"device": "cpu", "dtype": "auto", "threads": 1, "max_rows": 0, "answer_rows": 3}
    job |= {"metrics": ["exact", "json.a"]}
    job["settings"] = {"name": "x", "data": str(data), "batch": 4, "max_length": 64, **settings}
    return run_case(job)


@pytest.mark.parametrize("variant", KEYS)
def test_a_variant_learns_to_answer_and_is_scored(
    variant: str, bases: Bases, tmp_path: Path
) -> None:
    data = rows(tmp_path / "rows.jsonl", 8, '{{"a": 1}}')
    rate = 3e-3 if variant == "full" else 2e-2
    found = case(variant, bases, data, steps=40, learning_rate=rate, rank=8)

    assert found["steps"] == 40
    assert found["last_loss"] < 0.2 < found["first_loss"]
    assert found["right"] == {"exact": 8, "json.a": 8} and found["asked"] == 8
    share = found["trainable"] / found["parameters"]
    assert share == 1 if variant == "full" else 0 < share < 0.5


def test_without_steps_enough_nothing_is_right(bases: Bases, tmp_path: Path) -> None:
    data = rows(tmp_path / "rows.jsonl", 4, "yes")
    found = case("lora", bases, data, steps=1, learning_rate=0.0)

    assert found["right"] == {"exact": 0, "json.a": 0}


def test_variants_begin_at_the_loss_of_their_base(bases: Bases, tmp_path: Path) -> None:
    data = rows(tmp_path / "rows.jsonl", 4, "yes")
    losses = {v: case(v, bases, data, steps=1, learning_rate=0.0)["first_loss"] for v in KEYS}

    assert losses["full"] == pytest.approx(losses["lora"], rel=1e-5)
    assert losses["qlora"] != pytest.approx(losses["lora"], rel=1e-4)
    assert losses["qlora-double"] != losses["qlora"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_full_model_has_the_loss_of_the_trainers_pass(bases: Bases, dtype: torch.dtype) -> None:
    documents = [
        Document(tuple(range(3, 3 + length)), (False, *[True] * (length - 1)))
        for length in (5, 30, 11)
    ]
    total, _ = run_pass(
        open_base(RunConfig(base=bases.folders[DENSE], device="cpu")), [Share(documents, None)]
    )
    loss = FullModel(bases.folders[DENSE], CPU, dtype).loss(documents)

    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert loss.item() == pytest.approx(total.item(), rel=tolerance)


def test_the_three_bases_are_one_model(bases: Bases, dense: Path) -> None:
    opened = {kind: Checkpoint.open(path) for kind, path in bases.folders.items()}

    assert [opened[kind].is_quantized for kind in (DENSE, NF4, NF4_DOUBLE)] == [False, True, True]
    assert opened[DENSE].base_digest == Checkpoint.open(dense).base_digest
    assert bases.errors[DENSE] == 0 < 0.05 < bases.errors[NF4] < bases.errors[NF4_DOUBLE] < 0.2
    assert "in bf16" in bases.origin


def test_an_nf4_folder_can_stand_in_for_a_dense_one_and_the_note_says_so(tmp_path: Path) -> None:
    source = write_tiny_base(tmp_path / "nf4", double_quant=False)
    bases = make_bases(source, tmp_path / "bases")

    assert "stand-in" in bases.origin
    assert weight_error(bases.folders[DENSE], source) < 0.005
    assert bases.errors[NF4] < 0.005, "what was on the grid stays on it"


def test_the_command_prints_a_row_and_records_a_line_for_each_variant(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.jsonl"
    command = ["bench", "cost", "--device", "cpu", "--threads", "1", "--source", str(dense)]
    command += ["--train", str(PIRATE), "--test", str(PIRATE), "--variants", "lora", "--steps", "2"]
    command += ["--length", "96", "--max-rows", "3", "--folder", str(tmp_path / "bases")]

    assert main([*command, "--json", str(file)]) == 0
    _, line = map(json.loads, file.read_text().splitlines())
    assert (line["kind"], line["variant"], line["asked"], line["steps"]) == ("cost", "lora", 3, 2)
    shown = capsys.readouterr().out
    assert "| LoRA on bf16 |" in shown and "Note: the dense weights are" in shown
    assert sorted(p.name for p in (tmp_path / "bases").iterdir()) == [DENSE, NF4, NF4_DOUBLE]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--variants", "lora,magic"], "variants: 'magic' is not one of"),
        (["--metrics", "f1"], "'f1' is not one of"),
        (["--rank", "999"], "rank"),
        (["--runs", "0"], "runs"),
        (["--test", "missing.jsonl"], "test: there is no missing.jsonl"),
    ],
)
def test_what_no_run_could_do_is_refused_at_once(
    flags: list[str], reason: str, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "cost", "--device", "cpu", "--source", str(dense)]
    command += ["--train", str(PIRATE), "--test", str(PIRATE)]

    assert main([*command, *flags]) == 2
    assert reason in capsys.readouterr().err
