"""One training job on disk: what was asked, how it stands, and what its process has written.

A folder with `job.json`, the settings of `loriner train`, its log and its run. Knows no processes
and no HTTP. Invariant: `job.json` is replaced whole, so a job always reads as some state it had.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

VALIDATING, QUEUED, RUNNING = "validating_files", "queued", "running"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
ENDED = (SUCCEEDED, FAILED, CANCELLED)
MAX_LOG_BYTES = 1 << 20
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class JobState:
    """What `job.json` holds."""

    id: str
    created_at: int
    model: str
    name: str  # the adapter that it makes
    training_file: str
    validation_file: str | None
    hyperparameters: Mapping[str, Any]
    settings: Mapping[str, Any]  # of `loriner train`
    seed: int
    suffix: str | None
    metadata: Mapping[str, str] | None
    status: str = QUEUED
    started_at: int | None = None
    finished_at: int | None = None
    error: Mapping[str, Any] | None = None
    checkpoints: Mapping[str, str] = field(default_factory=dict)  # step -> published name


class JobFolder:
    """`folder.state` is the truth; `change` replaces it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def run(self) -> Path:
        """What `loriner train` calls its out."""
        return self.path / "run"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def state(self) -> JobState:
        return JobState(**json.loads((self.path / "job.json").read_text(encoding="utf-8")))

    def create(self, state: JobState) -> None:
        self.path.mkdir(parents=True)
        self._write(state)
        lines = [f"{key} = {_toml(value)}" for key, value in state.settings.items()]
        (self.path / "settings.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def change(self, **changes: Any) -> JobState:
        state = replace(self.state, **changes)
        self._write(state)
        return state

    def end(self, status: str, error: Mapping[str, Any] | None = None) -> None:
        self.change(status=status, error=error, finished_at=int(time.time()))

    def has_checkpoint(self) -> bool:
        return bool(self.checkpoints())

    def checkpoints(self) -> dict[int, Path]:
        """Step -> folder, ascending."""
        found = {
            int(match[1]): path
            for path in (self.run / "checkpoints").glob("step-*")
            if (match := _STEP.fullmatch(path.name))
        }
        return dict(sorted(found.items()))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are whole."""
        try:
            lines = (self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def failure(self) -> str:
        """Why its process failed, in its own words."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - MAX_LOG_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return "It left no log."
        mark = "loriner: error: "
        if mark in text:
            return text.rsplit(mark, 1)[1].strip()[:4000]
        return text.strip().rsplit("\n", 1)[-1][:4000] or "It ended without a word."

    def _write(self, state: JobState) -> None:
        part = self.path / ".job.json"
        part.write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        part.replace(self.path / "job.json")


def _toml(value: object) -> str:
    """A bool, number or text. JSON writes it as TOML does, but for two kinds of characters."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
