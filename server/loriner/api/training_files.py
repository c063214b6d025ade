"""Uploaded training files: /v1/files as OpenAI shapes it, on disk under the training folder.

Knows bytes and names, not what the rows mean (`loriner train` does). Invariant: a file that is
listed is whole, and no name of the sender's is ever a path.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from loriner.adapters.names import show
from loriner.errors import (
    InvalidRequestError,
    LorinerError,
    ObjectNotFoundError,
    PayloadTooLargeError,
)

PURPOSES = ("fine-tune",)
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
MAX_FILES = 10_000
_CHUNK = 1 << 20
_ID = re.compile(r"file-[0-9a-f]{24}")


@dataclass(frozen=True, slots=True)
class TrainingFile:
    """One file, as it is answered."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    object: str = "file"
    status: str = "processed"


class TrainingFiles:
    """The files in `root`; each is a folder with its bytes and `file.json`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def add(self, source: BinaryIO, filename: str, purpose: str, max_bytes: int) -> TrainingFile:
        """Copy `source` in. Raises InvalidRequestError, PayloadTooLargeError."""
        suffix = Path(filename).suffix.lower()
        if suffix not in SUFFIXES:
            raise InvalidRequestError(f"file must end in one of {', '.join(SUFFIXES)}.", "file")
        if purpose not in PURPOSES:
            raise InvalidRequestError(f"purpose must be one of {', '.join(PURPOSES)}.", "purpose")
        if len(self.list()) >= MAX_FILES:
            raise InvalidRequestError(f"There are {MAX_FILES} files already.", "file")
        file_id = f"file-{uuid.uuid4().hex[:24]}"
        part = self._root / f".{file_id}"
        part.mkdir(parents=True)
        try:
            size = _copy(source, part / f"data{suffix}", max_bytes)
            made = TrainingFile(file_id, size, int(time.time()), show(filename, 256), purpose)
            (part / "file.json").write_text(json.dumps(asdict(made)), encoding="utf-8")
            part.rename(self._root / file_id)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return made

    def list(self) -> list[TrainingFile]:
        """Newest first."""
        found = [self.get(path.name) for path in self._root.glob("file-*")]
        return sorted(found, key=lambda file: (-file.created_at, file.id))

    def get(self, file_id: str, param: str = "file_id") -> TrainingFile:
        """Raises ObjectNotFoundError."""
        try:
            text = (self._folder(file_id, param) / "file.json").read_text(encoding="utf-8")
        except OSError:
            raise _unknown(file_id, param) from None
        return TrainingFile(**json.loads(text))

    def path(self, file_id: str, param: str = "file_id") -> Path:
        """Where its bytes are. Raises ObjectNotFoundError."""
        found = list(self._folder(file_id, param).glob("data.*"))
        if not found:
            raise _unknown(file_id, param)
        return found[0]

    def remove(self, file_id: str) -> None:
        self.get(file_id)
        shutil.rmtree(self._folder(file_id, "file_id"), ignore_errors=True)

    def _folder(self, file_id: str, param: str) -> Path:
        if not _ID.fullmatch(file_id):
            raise _unknown(file_id, param)
        return self._root / file_id


def _unknown(file_id: str, param: str) -> LorinerError:
    return ObjectNotFoundError(f"No such File object: {show(file_id)}", param)


def _copy(source: BinaryIO, target: Path, max_bytes: int) -> int:
    size = 0
    with target.open("xb") as file:
        read: Callable[[int], bytes] = source.read
        while data := read(_CHUNK):
            size += len(data)
            if size > max_bytes:
                raise PayloadTooLargeError(f"The file is larger than {max_bytes} bytes.")
            file.write(data)
    if not size:
        raise InvalidRequestError("The file is empty.", "file")
    return size
