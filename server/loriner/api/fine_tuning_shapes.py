"""Training jobs, their events and checkpoints as OpenAI's objects. Pure but for reading files."""

from __future__ import annotations

from typing import Any

from loriner.adapters.names import DEFAULT_TENANT
from loriner.api.training_job import FAILED, SUCCEEDED, JobFolder


def job_shape(folder: JobFolder) -> dict[str, Any]:
    """`fine_tuning.job`."""
    state = folder.state
    is_done = state.status == SUCCEEDED
    steps = [record for record in folder.metrics() if record["event"] == "step"]
    return {
        "id": state.id,
        "object": "fine_tuning.job",
        "created_at": state.created_at,
        "model": state.model,
        "fine_tuned_model": public(state.name) if is_done else None,
        "finished_at": state.finished_at,
        "status": state.status,
        "error": state.error,
        "hyperparameters": state.hyperparameters,
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": state.hyperparameters},
        },
        "training_file": state.training_file,
        "validation_file": state.validation_file,
        "organization_id": DEFAULT_TENANT,
        "result_files": [],
        "seed": state.seed,
        "trained_tokens": sum(r["num_tokens"] for r in steps) if is_done else None,
        "estimated_finish": None,
        "integrations": [],
        "metadata": state.metadata,
        "user_provided_suffix": state.suffix,
    }


def event_shapes(folder: JobFolder) -> list[dict[str, Any]]:
    """`fine_tuning.job.event`s, newest first."""
    state = folder.state
    events = [_event(folder, "created", state.created_at, "Created the fine-tuning job.")]
    started = state.started_at
    if started is not None:
        events.append(_event(folder, "started", started, "Fine-tuning job started."))
        for record in folder.metrics():
            events.append(_metrics_event(folder, started, record))
    if state.finished_at is not None:
        message = f"The job has {state.status}."
        if state.status == FAILED and state.error:
            message = f"{message} {state.error['message']}"
        if state.status == SUCCEEDED:
            message = f"New fine-tuned model created: {public(state.name)}"
        level = "error" if state.status == FAILED else "info"
        events.append(_event(folder, "ended", state.finished_at, message, level))
    return events[::-1]


def checkpoint_shapes(folder: JobFolder) -> list[dict[str, Any]]:
    """`fine_tuning.job.checkpoint`s that are published, newest first."""
    state, metrics = folder.state, folder.metrics()
    shapes = []
    for step, name in sorted(state.checkpoints.items(), key=lambda pair: -int(pair[0])):
        found: dict[str, Any] = {"step": int(step)}
        for record in metrics:
            if record["step"] == int(step):
                key = "train_loss" if record["event"] == "step" else "full_valid_loss"
                found[key] = record.get("loss", record.get("eval_loss"))
        shapes.append(
            {
                "id": f"ftckpt-{state.id.removeprefix('ftjob-')}-{step}",
                "object": "fine_tuning.job.checkpoint",
                "created_at": state.finished_at,
                "fine_tuned_model_checkpoint": public(name),
                "fine_tuning_job_id": state.id,
                "metrics": found,
                "step_number": int(step),
            }
        )
    return shapes


def public(name: str) -> str:
    """The name to ask for: short in the default tenant."""
    return name.removeprefix(f"{DEFAULT_TENANT}/")


def _metrics_event(folder: JobFolder, started: int, record: dict[str, Any]) -> dict[str, Any]:
    step = record["step"]
    if record["event"] == "step":
        message = f"Step {step}: training loss={record['loss']:.4f}"
        data = {"step": step, "train_loss": record["loss"], "lr": record["learning_rate"]}
        data |= {"num_tokens": record["num_tokens"], "at": record.get("at", started)}
    else:
        message = f"Step {step}: validation loss={record['eval_loss']:.4f}"
        data = {"step": step, "full_valid_loss": record["eval_loss"]}
    event = _event(folder, f"{record['event']}-{step}", int(record.get("at", started)), message)
    return event | {"type": "metrics", "data": data}


def _event(
    folder: JobFolder, key: str, at: int, message: str, level: str = "info"
) -> dict[str, Any]:
    return {
        "id": f"ftevent-{folder.path.name.removeprefix('ftjob-')}-{key}",
        "object": "fine_tuning.job.event",
        "created_at": at,
        "level": level,
        "message": message,
        "type": "message",
        "data": None,
    }
