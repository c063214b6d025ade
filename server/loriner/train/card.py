"""README.md of an adapter: a model card that says what it was made from, how, and how well."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from loriner import __version__
from loriner.train.base import Base
from loriner.train.gate import Gate
from loriner.train.job import Job
from loriner.train.samples import Sample

FILE = "README.md"
MAX_CELL = 300
_SHOWN = (
    "rank alpha rslora dropout target_modules learning_rate schedule warmup batch accumulation "
    "max_length packing neftune weight_decay max_grad_norm optimizer seed"
)


def write_card(
    folder: Path,
    job: Job,
    base: Base,
    gate: Gate,
    samples: Sequence[Sample],
    from_step: int,
    command: str,
) -> None:
    parts = [
        _head(job, base),
        _origin(job, base),
        _settings(job),
        _losses(job, from_step, gate),
        _samples(samples),
        f"## Command\n\n```sh\n{command}\n```\n\nMade with Loriner {__version__}.\n",
    ]
    (folder / FILE).write_text("\n".join(part for part in parts if part), encoding="utf-8")


def _head(job: Job, base: Base) -> str:
    return (
        f"---\nbase_model: {json.dumps(base.path.name)}\nlibrary_name: peft\n"
        f"tags:\n- lora\n- qlora\n---\n\n# {job.settings.name}\n\n"
        "A LoRA adapter, trained on the NF4 bytes of its base and meant to be served unmerged on "
        "them.\n"
    )


def _origin(job: Job, base: Base) -> str:
    share = job.lora.num_parameters / base.config.num_parameters
    rows = [
        ("base", f"{base.path.name}, digest `{base.digest}`"),
        ("data", f"{job.data.path.name}, SHA-256 `{job.data.digest}`"),
        (
            "rows",
            f"{len(job.data.entries)}, {job.data.num_learnt} learnt tokens of "
            f"{job.data.num_tokens}",
        ),
        ("trainable", f"{job.lora.num_parameters} parameters, {share:.2%} of the base's"),
    ]
    if job.held:
        held = f"{job.held.path.name}, {len(job.held.entries)} rows, SHA-256 `{job.held.digest}`"
        rows.append(("held out", held))
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows)


def _settings(job: Job) -> str:
    lines = [f"| {name} | {getattr(job.settings, name)} |" for name in _SHOWN.split()]
    lines.append(f"| steps | {job.step} of {job.num_steps} |")
    return "## Settings\n\n| | |\n|---|---|\n" + "\n".join(lines) + "\n"


def _losses(job: Job, from_step: int, gate: Gate) -> str:
    lines = ["## Losses", "", "![loss](loss.png)", ""]
    if job.steps:
        first, last = job.steps[0].loss, job.steps[-1].loss
        lines.append(f"Training: {first:.4f} at first, {last:.4f} at last.")
    if job.evals:
        lines += ["", "| step | held-out loss |", "|---|---|"]
        lines += [f"| {r.step or '0 (base)'} | {r.eval_loss:.4f} |" for r in job.evals]
        lines += ["", f"The weights are those of step {from_step}."]
    return "\n".join([*lines, "", f"{gate.line()}.", ""])


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    lines = ["## Samples", "", "| question | base | adapter |", "|---|---|---|"]
    for sample in samples:
        cells = (sample.question, sample.base, sample.adapter)
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    short = text if len(text) <= MAX_CELL else text[:MAX_CELL] + " ..."
    return short.replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
