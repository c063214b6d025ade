"""Train, publish, gate, promote, roll back against a live server: served means trained."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loriner
from loriner.adapters import formats
from loriner.adapters.pool import pack
from loriner.adapters.store import Store
from loriner.cli import main
from loriner.model.transformer import layout
from loriner.model.weights import Checkpoint
from loriner.train.base import open_base
from loriner.train.canaries import FILE, read
from loriner.train.settings import RunConfig
from tests.engines import build_engine, engine_config
from tests.fakes import make_request
from tests.servers import ServerProcess
from tests.tiny import write_tiny_base
from tests.train.forward import trainer_logits

pytestmark = [pytest.mark.timeout(120)]

PIRATE = Path(__file__).resolve().parents[1] / "data" / "train" / "pirate.jsonl"
OPTIONS = "--rank 4 --batch 3 --steps 8 --learning-rate 2e-2 --samples 0 --max-length 160"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(base, tmp_path_factory.mktemp("server") / "store") as server:
        yield server


def train(base: Path, out: Path, name: str, *more: str) -> int:
    options = ["--base", str(base), "--device", "cpu", "--data", str(PIRATE), "--name", name]
    return main(["train", *options, "--out", str(out), *OPTIONS.split(), *more])


def generation(server: ServerProcess, name: str) -> str | None:
    response = server.http.get(f"/admin/adapters/{name}")
    return str(response.json()["generation"]) if response.status_code == 200 else None


def names(server: ServerProcess) -> set[str]:
    return {entry["name"] for entry in server.http.get("/admin/adapters").json()["adapters"]}


def tampered(folder: Path, target: Path) -> Path:
    """A copy whose weights are a little stronger than what was trained."""
    shutil.copytree(folder, target)
    weights = load_file(target / "adapter_model.safetensors")
    save_file(
        {name: tensor * 1.05 for name, tensor in weights.items()},
        target / "adapter_model.safetensors",
        {"format": "pt"},
    )
    return target


@pytest.fixture(scope="module")
def trained(server: ServerProcess, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is published as `pirate` and promoted to `prod`."""
    out = tmp_path_factory.mktemp("trained")
    more = ("--eval-split", "0.2", "--publish", server.url, "--promote", "prod")
    assert train(base, out, "pirate", *more) == 0
    return out / "adapter"


def test_a_trained_adapter_is_served_as_it_was_trained(
    server: ServerProcess, trained: Path
) -> None:
    canary = read(trained).canaries[0]
    question = canary.messages[-1]["content"]
    served = server.ask(question, "pirate", max_tokens=8)

    assert tuple(served.token_ids) == canary.token_ids
    assert server.ask(question, max_tokens=8).token_ids != served.token_ids
    assert names(server) >= {"default/pirate", "default/prod"}
    assert not any("candidate" in name for name in names(server))
    assert generation(server, "prod") == generation(server, "pirate")


def test_logits_of_trainer_and_server_are_the_same(base: Path, trained: Path) -> None:
    """The trainer's forward and the serving transformer over the same tokens, in fp32."""
    assert_same_logits(base, trained, list(range(40, 70)))


@pytest.mark.timeout(120)
def test_logits_of_trainer_and_server_are_the_same_on_smollm2(smollm2: Path) -> None:
    adapter = Path(loriner.__file__).parent / "data" / "adapters" / "pirate"
    assert_same_logits(smollm2, adapter, list(range(5000, 5040)))


def assert_same_logits(base: Path, trained: Path, prompt: list[int]) -> None:
    ours = trainer_logits(base, trained, [prompt], "cpu")[0][-1]

    config = Checkpoint.open(base).config
    adapter = formats.load(trained, config.modules())
    seat = pack(adapter, layout(config), torch.float32)
    engine = build_engine(engine_config(base), {"a": seat})
    engine.run_all([make_request(prompt, generation="a", max_tokens=1)])
    theirs = engine.logits["r", 0][0]
    engine.close()

    assert (ours - theirs).abs().max() <= 1e-3


def test_an_adapter_that_is_not_what_was_trained_is_not_published(
    server: ServerProcess, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, known = generation(server, "pirate"), names(server)
    bad = tampered(trained, tmp_path / "bad")
    add = ["adapters", "add", "--canaries", "--url", server.url]

    assert main([*add, "pirate", str(bad)]) == 1
    error = capsys.readouterr().err
    assert "default/pirate was not published: canary 1 of 4 is served otherwise" in error
    assert (generation(server, "pirate"), names(server)) == (before, known)
    assert main([*add, "again", str(trained)]) == 0
    assert generation(server, "again") == before
    (bad / FILE).unlink()
    assert main([*add, "pirate", str(bad)]) == 1
    assert "not made by `loriner train`" in capsys.readouterr().err


def test_an_alias_moves_only_when_the_gate_passes_and_can_be_moved_back(
    server: ServerProcess,
    base: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = generation(server, "prod")
    publish = ("--publish", server.url, "--promote", "prod")
    never = ("--seed", "1", "--eval-split", "0.2", "--gate", "exact")
    assert train(base, tmp_path / "a", "second", *never, *publish) == 1
    assert "default/prod stays as it is: the gate has not passed" in capsys.readouterr().out
    assert generation(server, "second") != first
    assert generation(server, "prod") == first

    more = ("--seed", "2", "--eval-split", "0.2")
    assert train(base, tmp_path / "b", "third", *more, *publish) == 0
    third = generation(server, "third")
    assert generation(server, "prod") == third

    back = ["adapters", "rollback", "--url", server.url]
    assert main([*back, "prod"]) == 0
    assert generation(server, "prod") == first
    assert main([*back, "prod", "--to", str(third)[:12]]) == 0
    assert generation(server, "prod") == third
    capsys.readouterr()
    assert main([*back, "third"]) == 1
    assert "nothing before the present generation" in capsys.readouterr().err


def test_what_cannot_be_published_to_is_told_before_training(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--admin-key", "boss")
    with ServerProcess(base, tmp_path / "store", *options, key="user") as locked:
        to = ("--publish", locked.url, "--key")
        assert train(base, tmp_path / "run", "pirate", *to, "user") == 1
        error = capsys.readouterr().err
        assert "nothing was trained, as it could not be published: " in error
        assert "(status 403)" in error
        elsewhere = ("--publish", f"{locked.url}/v1", "--key", "boss")
        assert train(base, tmp_path / "run", "pirate", *elsewhere) == 1
        assert "(status 404)" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        assert train(base, tmp_path / "run", "pirate", *to, "boss") == 0


def test_a_failed_publish_says_how_it_is_done_by_hand(
    server: ServerProcess,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No replay agrees to no tolerance at all, as log-probabilities are rounded in the file."""
    config = tmp_path / "run.toml"
    config.write_text(f'publish = "{server.url}"\npromote = "best"\ncanary_tolerance = 0.0\n')
    more = ("--config", str(config), "--eval-split", "0.2")
    assert train(base, tmp_path / "run", "strict", *more) == 1
    shown = capsys.readouterr()
    assert "default/strict was not published" in shown.err
    lines = [line.removeprefix("By hand: loriner ") for line in shown.out.splitlines()]
    add, alias = lines[-2:]
    assert generation(server, "strict") is None

    assert add.startswith("adapters add --canaries --url http://")
    assert main(shlex.split(add.replace("--canary-tolerance 0 ", ""))) == 0
    assert main(shlex.split(alias)) == 0
    assert generation(server, "best") == generation(server, "strict") is not None


def test_a_store_without_a_server_gets_the_same_checks(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    more = ("--eval-split", "0.2", "--store", str(store), "--promote", "prod")
    assert train(base, tmp_path / "run", "acme/pirate", *more) == 0
    assert "served as it was trained" in capsys.readouterr().out

    checkpoint = Checkpoint.open(base)
    with Store(store, checkpoint.config.modules(), checkpoint.base_digest) as opened:
        found: dict[str, Any] = {record.name: record.generation for record in opened.list()}
    assert set(found) == {"acme/pirate", "acme/prod"}
    assert len(set(found.values())) == 1


def test_evaluation_scores_base_and_adapters_over_the_same_rows(
    server: ServerProcess, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows whose wanted answers are what the adapter says: it is right on all, the base on none."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    questions = [json.loads(line)["messages"][0] for line in PIRATE.read_text().splitlines()[:4]]
    lines = []
    for question in questions:
        body = {"messages": [question], "adapter": "pirate", "temperature": 0, "max_tokens": 12}
        answer = server.http.post("/v1/chat/completions", json=body).json()
        wanted = {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
        lines.append(json.dumps({"messages": [question, wanted]}))
    rows.write_text("\n".join(lines))
    evaluate = ["evaluate", "--data", str(rows), "--url", server.url, "--json", str(out)]

    assert main([*evaluate, "--adapters", "pirate,base", "--max-tokens", "12"]) == 0
    shown = capsys.readouterr().out
    assert "100.0%" in shown
    assert "8 rows for 2" in shown
    assert main([*evaluate, "--adapters", "base,pirate", "--metric", "loss", "--limit", "2"]) == 0
    scores = [json.loads(line) for line in out.read_text().splitlines()]
    assert [s["score"] for s in scores[:2]] == [1.0, 0.0]
    assert scores[0]["low"] == pytest.approx(0.51, abs=0.01)
    assert scores[3]["score"] < scores[2]["score"]
    assert scores[3]["low"] < scores[3]["score"] < scores[3]["high"]


def test_a_loss_through_the_server_is_the_trainer_s_own(
    server: ServerProcess, base: Path, trained: Path, tmp_path: Path
) -> None:
    """Over prompt and completion, where there is no template between them."""
    from loriner.train.masks import Document
    from loriner.train.passes import mean_loss

    rows, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    rows.write_text(json.dumps({"prompt": "The sea", "completion": " is wide"}))
    flags = ["--url", server.url, "--json", str(out), "--metric", "loss"]
    assert main(["evaluate", "--data", str(rows), *flags]) == 0
    (score,) = [json.loads(line) for line in out.read_text().splitlines()]

    trainer = open_base(RunConfig(base=base, device="cpu"))
    text = b"The sea is wide"
    document = Document(tuple(text), tuple(i >= 7 for i in range(len(text))))
    assert score["score"] == pytest.approx(mean_loss(trainer, None, [document], 99), abs=1e-3)
    assert score["count"] == 8
