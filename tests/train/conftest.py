"""A tiny base on disk, its masker, small data files, and who ends a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loriner.train.job import Job
from loriner.train.masks import Masker
from loriner.train.qlora import Silent
from tests.tiny import IM_END, write_tiny_base, write_tokenizer

WriteRows = Callable[..., Path]
PIRATE = Path(__file__).resolve().parents[1] / "data" / "train" / "pirate.jsonl"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("train") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def masker(tokenizer: Any) -> Masker:
    return Masker(tokenizer, [IM_END])


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    def write(rows: Iterable[Mapping[str, Any] | str], name: str = "rows.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    """One row of chat messages."""
    user, assistant = {"role": "user"}, {"role": "assistant", **more}
    return {"messages": [user | {"content": question}, assistant | {"content": answer}]}


class StopAfter(Silent):
    """Asks the loop to stop once some job has done so many steps."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def on_step(self, job: Job, record: Any) -> None:
        self.wants_stop = record.step >= self._step
