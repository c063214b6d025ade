"""Where a base can come from: a dense Hugging Face folder here, a GGUF file in `gguf.py`.

A source knows its files and hands out Hugging Face names, and knows nothing of NF4. Invariant:
weights are streamed, so that no more than one file of the source is alive at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from loriner.errors import CheckpointError
from loriner.model.config import ModelConfig
from loriner.model.shards import Shards, read_json
from loriner.model.weights import DENSE_DTYPES, check_names, is_redundant

# What a folder needs besides weights and config.json: tokenizer, chat template, licence. No code.
SIDE_FILES = (
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
    "LICENSE*",
    "merges.txt",
    "NOTICE*",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


class Source(Protocol):
    """A dense model to quantise."""

    @property
    def config(self) -> dict[str, Any]:
        """Its Hugging Face config."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model, once, by its Hugging Face name; f32, f16 or bf16."""

    def write_side_files(self, target: Path) -> None:
        """Put tokenizer, chat template and generation config into `target`."""


class HfSource:
    """A folder with config.json and safetensors in f32, f16 or bf16, in one file or many."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError when the tensors are not those of the config."""
        self.folder = folder
        self.config = read_json(folder / "config.json")
        if self.config.get("quantization_config"):
            raise CheckpointError(f"{folder} is quantised already.")
        self.model = ModelConfig.from_hf(self.config)
        self.shards = Shards.open(folder)
        headers = self.shards.headers()
        check_names(self.model, set(headers))
        for name, shape in self.model.tensors().items():
            if headers[name].shape != shape:
                found = list(headers[name].shape)
                raise CheckpointError(f"{name} has shape {found}, expected {list(shape)}.")
            if headers[name].dtype not in DENSE_DTYPES:
                raise CheckpointError(
                    f"{name} has dtype {headers[name].dtype}, which is not dense."
                )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.shards.stream():
            if not is_redundant(name, self.model):
                yield name, tensor

    def write_side_files(self, target: Path) -> None:
        copy_side_files(self.folder, target)


def copy_side_files(folder: Path, target: Path) -> None:
    for pattern in SIDE_FILES:
        for path in folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
