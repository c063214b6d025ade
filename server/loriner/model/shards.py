"""The safetensors files of one model folder: which tensor is where; mapped, never copied.

Knows names, shapes and files, nothing of what a tensor means. Pickled weights are refused unread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from loriner.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

ITEM_BYTES: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}


@dataclass(frozen=True, slots=True)
class Header:
    """Shape and safetensors dtype name (F32, BF16, U8...) of one stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 1)


@dataclass(slots=True)
class Shards:
    """The tensors of a folder. Files are mapped on first use and stay mapped while this lives."""

    folder: Path
    file_of: Mapping[str, str]  # tensor name -> file name inside the folder
    _open: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Find the files. Raises CheckpointError when there are none or the index is malformed."""
        if (folder / INDEX).is_file():
            return cls(folder, _read_index(folder / INDEX))
        if not (folder / SINGLE).is_file():
            pickled = sorted(p.name for p in folder.glob("*.bin"))
            hint = f" ({pickled[0]} is pickled and is not read)" if pickled else ""
            raise CheckpointError(f"{folder}: there is no {SINGLE} or {INDEX}{hint}.")
        shards = cls(folder, {})
        shards.file_of = dict.fromkeys(shards._handle(SINGLE).keys(), SINGLE)
        return shards

    @property
    def files(self) -> list[str]:
        return sorted(set(self.file_of.values()))

    def headers(self) -> dict[str, Header]:
        """Shape and dtype of every tensor, without reading any."""
        found = {}
        for name, file in self.file_of.items():
            try:
                part = self._handle(file).get_slice(name)
            except SafetensorError as error:
                raise CheckpointError(f"{file} has no tensor {name!r}.") from error
            found[name] = Header(tuple(part.get_shape()), part.get_dtype())
        return found

    def get(self, name: str) -> Tensor:
        """The stored tensor, backed by the file; do not write to it."""
        tensor: Tensor = self._handle(self.file_of[name]).get_tensor(name)
        return tensor

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, file after file; a file is unmapped before the next is opened."""
        self._open.clear()
        for file in self.files:
            for name in sorted(n for n, f in self.file_of.items() if f == file):
                yield name, self.get(name)
            self._open.clear()

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / file}: {error}") from error
        return self._open[file]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`. Raises CheckpointError when it is missing or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return value


def _read_index(path: Path) -> dict[str, str]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path} has no weight_map.")
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path} names {file!r}, which is not a file of this folder.")
    return files
