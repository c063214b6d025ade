"""Checkpoints of one job: OUT/checkpoints/step-N, written aside and renamed, so each is whole.

A checkpoint is itself a PEFT folder, with the optimiser's state and the history beside it.
Invariant: a job that resumes from one has the bits it had, or is refused with the difference.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loriner.errors import TrainError
from loriner.train.base import Base
from loriner.train.job import Job
from loriner.train.optim import load_state
from loriner.train.peft_folder import WEIGHTS_NAME, write_peft_folder

KEPT = 3  # checkpoints of a run, newest
LAYOUT = 2  # of the optimiser's state: of one tensor; 1 was of each A and B
STATE, OPTIMIZER, BEST = "state.json", "optimizer.pt", "best.safetensors"
_NAME = re.compile(r"step-(\d{6,})")
# Settings that may differ between a run and its continuation: they change no step.
_FREE = frozenset(
    [
        "name",
        "data",
        "eval_data",
        "out",
        "eval_every",
        "evals_per_epoch",
        "saves_per_epoch",
        "save_every",
        "samples",
        "canaries",
        "sample_tokens",
        "gate",
        "gate_min",
        "gate_rows",
        "max_bad_share",
        "keep_best",
        "early_stopping",
    ]
)


def save_checkpoint(job: Job, base: Base) -> Path:
    """Write the job as it stands after its last whole step; the folder."""
    root = job.settings.folder / "checkpoints"
    final, part = root / f"step-{job.step:06d}", root / f".part-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_peft_folder(part, job.lora, job.settings, base.digest, base.path.name)
    torch.save(job.optimizer.state_dict(), part / OPTIMIZER)
    if job.best is not None:
        save_file(job.best, part / BEST)
    state = {**job.state(), "layout": LAYOUT, "identity": _identity(job, base)}
    (part / STATE).write_text(json.dumps(state), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    for old in list_checkpoints(job.settings.folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted((p for p in found if _NAME.fullmatch(p.name)), key=lambda p: p.name)


def resume(job: Job, base: Base) -> Path:
    """Put `job` where its newest checkpoint left it. Raises TrainError saying what differs."""
    found = list_checkpoints(job.settings.folder)
    if not found:
        raise TrainError(f"there is no checkpoint in {job.settings.folder} to resume from.")
    folder = found[-1]
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        _check_layout(folder, state)
        _check_identity(folder, state["identity"], _identity(job, base))
        device = str(job.lora.parameters()[0].device)
        job.lora.load(load_file(folder / WEIGHTS_NAME, device=device))
        saved = torch.load(folder / OPTIMIZER, map_location=device, weights_only=True)
        load_state(job.optimizer, saved)
        if (folder / BEST).is_file():
            job.best = load_file(folder / BEST)
        job.restore(state)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise TrainError(f"{folder} cannot be resumed from: {error}") from error
    return folder


def _check_layout(folder: Path, state: dict[str, Any]) -> None:
    if state.get("layout", 1) != LAYOUT:
        raise TrainError(
            f"{folder} cannot be resumed from: its optimiser's state is in layout "
            f"{state.get('layout', 1)}, and this version of Loriner reads layout {LAYOUT} alone. "
            "Finish the run with the version that began it, or start anew in another --out."
        )


def _identity(job: Job, base: Base) -> dict[str, Any]:
    """What must be the same for the next step to be the same."""
    settings = {
        name: getattr(job.settings, name)
        for name in job.settings.__dataclass_fields__
        if name not in _FREE
    }
    held = job.held.digest if job.held else None
    digests = {"base": base.digest, "data": job.data.digest, "eval_data": held}
    place = {"device": base.device.type, "dtype": str(base.dtype).removeprefix("torch.")}
    return {**settings, **digests, **place, "num_steps": job.num_steps}


def _check_identity(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [key for key in now if saved.get(key) != now[key]]
    if changed:
        told = ", ".join(f"{key} was {saved.get(key)}, is {now[key]}" for key in changed)
        raise TrainError(f"{folder} cannot be resumed from: {told}. Start anew in another --out.")
