"""The gate: is the adapter better than the base on held-out data? Decides what may be promoted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loriner.train.asking import ask
from loriner.train.base import Base
from loriner.train.job import Job
from loriner.train.json_file import write_json
from loriner.train.lora import Lora
from loriner.train.masks import Masker
from loriner.train.recording import spread
from loriner.train.scoring import SCORERS

FILE = "loriner_gate.json"


@dataclass(frozen=True, slots=True)
class Gate:
    """What was compared and whether it passed; scores are losses, or shares of right answers."""

    metric: str
    passed: bool
    base: float | None
    adapter: float | None
    count: int
    reason: str

    def line(self) -> str:
        verdict = "passed" if self.passed else "not passed"
        return f"Gate {verdict}: {self.reason}"


def judge(job: Job, base: Base, masker: Masker, tokenizer: Any) -> Gate:
    """Compare base and adapter as `settings.gate` says; the weights must be the final ones."""
    metric = job.settings.gate
    if job.held is None:
        reason = "there is no held-out data (eval_data or eval_split)"
        return Gate(metric, False, None, None, 0, reason)
    if metric == "loss":
        return _by_loss(job)
    prompts = spread(job.held.prompts, job.settings.gate_rows)
    wanted = [prompt.answer for prompt in prompts]

    def share_right(lora: Lora | None) -> float:
        texts = ask(base, lora, prompts, masker, tokenizer)
        return sum(map(SCORERS[metric], texts, wanted)) / len(wanted)

    theirs, ours = share_right(None), share_right(job.lora)
    passed = ours > theirs and ours >= job.settings.gate_min
    need = f"more than the base's {theirs:.1%} and at least {job.settings.gate_min:.1%}"
    reason = f"{metric} {ours:.1%} of {len(wanted)} held-out rows; wanted is {need}"
    return Gate(metric, passed, theirs, ours, len(wanted), reason)


def _by_loss(job: Job) -> Gate:
    first = next((record for record in job.evals if record.step == 0), None)
    best = job.best_eval if job.best is not None else job.evals[-1]
    assert first is not None and best is not None and job.held is not None
    passed = best.eval_loss < first.eval_loss
    reason = f"eval loss {best.eval_loss:.4f}, the base has {first.eval_loss:.4f}"
    count = len(job.held.entries)
    return Gate("loss", passed, first.eval_loss, best.eval_loss, count, reason)


def write(folder: Path, gate: Gate) -> None:
    write_json(folder / FILE, asdict(gate))


def read(folder: Path) -> Gate | None:
    """None when the folder has none, or one that cannot be read."""
    try:
        return Gate(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
