"""openai-python's files and fine_tuning clients against a live server, unchanged."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import ServerProcess
from tests.tiny import write_tiny_base

openai = pytest.importorskip("openai")
pytestmark = [pytest.mark.timeout(120)]

PIRATE = Path(__file__).resolve().parents[1] / "data" / "train" / "pirate.jsonl"
SMALL: dict[str, Any] = {"rank": 2, "max_length": 160, "samples": 0, "batch": 3}
FLAGS = ("--training-threads", "1", "--training")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("server")
    with ServerProcess(base, root / "store", *FLAGS, str(root / "training"), key="boss") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="boss", max_retries=0) as client:
        yield client


def upload(client: Any, path: Path = PIRATE) -> str:
    with path.open("rb") as file:
        return str(client.files.create(file=file, purpose="fine-tune").id)


def wait_for(client: Any, job_id: str, *statuses: str) -> Any:
    deadline = time.monotonic() + 60
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in statuses:
        assert time.monotonic() < deadline and job.status != "failed", job
        time.sleep(0.1)
    return job


def test_files_come_back_as_they_were_sent(client: Any) -> None:
    file_id = upload(client)
    file = client.files.retrieve(file_id)

    assert (file.filename, file.purpose, file.bytes) == (
        "pirate.jsonl",
        "fine-tune",
        PIRATE.stat().st_size,
    )
    assert file_id in [entry.id for entry in client.files.list()]
    assert client.files.content(file_id).read() == PIRATE.read_bytes()
    assert client.files.delete(file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file_id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve("file-..%2f..%2fetc")
    with pytest.raises(openai.BadRequestError, match="must end in one of"):
        client.files.create(file=("a.exe", b"x"), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="purpose must be one of"):
        client.files.create(file=("a.jsonl", b"x"), purpose="batch")


def test_a_job_makes_an_adapter_that_answers(client: Any, server: ServerProcess) -> None:
    file_id = upload(client)
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file_id,
        validation_file=file_id,
        suffix="My Pirate",
        seed=3,
        metadata={"who": "me"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 1, "learning_rate_multiplier": 50}},
        },
        extra_body={"loriner": SMALL},
    )
    assert job.status in ("queued", "running")
    assert (job.training_file, job.seed, job.metadata) == (file_id, 3, {"who": "me"})
    done = wait_for(client, job.id, "succeeded")

    assert done.fine_tuned_model.startswith("my-pirate-")
    assert done.trained_tokens > 1000
    answer = client.chat.completions.create(
        model=done.fine_tuned_model,
        messages=[{"role": "user", "content": "Why is the sky blue?"}],
        max_tokens=4,
    )
    assert answer.model == done.fine_tuned_model
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))
    assert events[0].message == f"New fine-tuned model created: {done.fine_tuned_model}"
    assert events[-1].message == "Created the fine-tuning job."
    assert "Step 8: training loss=" in " ".join(event.message for event in events)
    trained = [event.data for event in events if event.type == "metrics" and "lr" in event.data]
    assert all(data["num_tokens"] > 0 and data["at"] > job.created_at - 1 for data in trained)
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.step_number == 8
    assert checkpoint.metrics.full_valid_loss < 10
    assert server.ask("hi", checkpoint.fine_tuned_model_checkpoint).status == 200
    assert job.id in [entry.id for entry in client.fine_tuning.jobs.list()]


def test_a_job_can_be_cancelled(client: Any) -> None:
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=upload(client), extra_body={"loriner": {**SMALL, "steps": 9999}}
    )
    wait_for(client, job.id, "running")
    waiting = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client))

    assert client.fine_tuning.jobs.cancel(waiting.id).status == "cancelled"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="already cancelled"):
        client.fine_tuning.jobs.cancel(job.id)


def test_a_job_on_bad_rows_fails_with_their_lines(client: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": 3}\n')
    job = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client, bad))
    job = wait_for(client, job.id, "failed")

    assert "line 1: `messages` must be a list of messages" in job.error.message
    assert job.fine_tuned_model is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_file": "file-0"}, "No such File object"),
        ({"model": "gpt-4"}, "gpt-4"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        ({"method": {"type": "dpo"}}, "method"),
        ({"extra_body": {"loriner": {"base": "x"}}}, "loriner.base is decided by the server"),
        ({"extra_body": {"loriner": {"x = 1\nbase": "y"}}}, "is not a setting of a job"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    changes: dict[str, Any], message: str, client: Any
) -> None:
    with pytest.raises(openai.APIStatusError, match=message):
        client.fine_tuning.jobs.create(
            **{"model": "tiny", "training_file": upload(client), **changes}
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lerning_rate": 1e-3},
            "loriner.lerning_rate is not a setting of a job; there are accumulation",
        ),
        ({"learningRate": 1e-3}, "learningRate is not a setting .* learning_rate"),
        ({"base_model": "x"}, "loriner.base_model is not a setting"),
        ({"publish": "http://x"}, "loriner.publish is not a setting"),
        ({"store": "s"}, "loriner.store is not a setting"),
        ({"rank": 999}, "loriner: rank must be at most 256, got 999"),
        ({"rank": 2.5}, "loriner: rank: 2.5 is not a valid int"),
        ({"rank": "many"}, "loriner: rank: 'many' is not a valid int"),
        ({"rank": True}, "loriner: rank: True is not a valid int"),
        ({"packing": "perhaps"}, "loriner: packing: 'perhaps' is not a valid bool"),
        ({"optimizer": "sgd"}, "loriner: optimizer must be one of adamw"),
        ({"target_modules": "lm_head"}, "loriner: target_modules: 'lm_head' is not one of"),
        ({"target_modules": ["q_proj"]}, "loriner.target_modules"),
        ({"early_stopping": 2}, "loriner: early_stopping needs eval_data or eval_split"),
        ({"save_every": 5, "saves_per_epoch": 2}, "save_every and saves_per_epoch exclude"),
        ({"canaries": 0}, "canaries of at least 1"),
        ({"promote": "prod"}, "promote needs eval_data or eval_split"),
        ({"promote": "A b", "eval_split": 0.5}, "loriner: promote: "),
    ],
)
def test_a_setting_that_train_would_refuse_makes_no_job(
    settings: dict[str, Any], message: str, client: Any
) -> None:
    before = [job.id for job in client.fine_tuning.jobs.list()]

    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.fine_tuning.jobs.create(
            model="tiny", training_file=upload(client), extra_body={"loriner": settings}
        )

    assert refused.value.param.startswith("loriner")
    assert [job.id for job in client.fine_tuning.jobs.list()] == before


def test_what_a_job_is_told_does_not_depend_on_the_servers_own_settings(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's process gets no LORINER_*, so the check reads none."""
    monkeypatch.setenv("LORINER_RANK", "999")
    flags = (*FLAGS, str(tmp_path / "training"))
    with (
        ServerProcess(base, tmp_path / "store", *flags) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client,
    ):
        body = {"loriner": {**SMALL, "steps": 2, "saves_per_epoch": 2, "columns": "a=\U0001f600"}}
        job = client.fine_tuning.jobs.create(
            model="tiny", training_file=upload(client), extra_body=body
        )
        while (job := client.fine_tuning.jobs.retrieve(job.id)).status != "failed":
            assert job.status != "succeeded"
            time.sleep(0.1)
    assert "\U0001f600" in job.error.message


def test_a_running_job_goes_on_after_a_restart(base: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, str(tmp_path / "training"))
    options = {**SMALL, "steps": 60, "save_every": 2}
    with ServerProcess(base, tmp_path / "store", *flags) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            job = client.fine_tuning.jobs.create(
                model="tiny", training_file=upload(client), extra_body={"loriner": options}
            )
            run = tmp_path / "training" / "jobs" / job.id / "run"
            deadline = time.monotonic() + 60
            while not list((run / "checkpoints").glob("step-*")):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert server.terminate().result() == 0
    state = json.loads((run.parent / "job.json").read_text())
    assert state["status"] == "queued"
    with (
        ServerProcess(base, tmp_path / "store", *flags) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client,
    ):
        done = wait_for(client, job.id, "succeeded")
        assert "Resuming" in (run.parent / "log.txt").read_text()
        assert server.ask("hi", done.fine_tuned_model).status == 200


def test_without_a_training_folder_there_are_no_such_routes(base: Path, tmp_path: Path) -> None:
    with (
        ServerProcess(base, tmp_path / "store") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client,
        pytest.raises(openai.NotFoundError),
    ):
        client.fine_tuning.jobs.list()
