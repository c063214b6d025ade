"""Dense model in, NF4 folder out: bitsandbytes' layout, for transformers and for `Checkpoint`.

Linears inside the layers become NF4 (from their values rounded to bf16); embeddings, lm_head, norms
and biases are stored as bf16. Invariant: the target appears whole or not at all, and memory holds
one output shard and one tensor, never the model.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from loriner.errors import CheckpointError
from loriner.model.config import ModelConfig
from loriner.model.nf4 import BLOCK, quantize_nf4
from loriner.model.shards import INDEX, SINGLE
from loriner.model.sources import HfSource, Source, write_json
from loriner.model.storage import QUANTIZATION_CONFIG, to_tensors
from loriner.model.weights import Checkpoint

Progress = Callable[[str, int, int], None]  # (what is being done, done, total)

MAX_SHARD_BYTES = 2 << 30


def quantize(
    source: Path,
    target: Path,
    *,
    double_quant: bool,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> str:
    """Quantise a Hugging Face folder or a GGUF file into the new folder `target`; the base_digest.

    `double_quant` also quantises the scales (0.516 instead of 0.5625 bytes a weight). Raises
    CheckpointError, and leaves nothing behind, when the source is unsupported or the target exists.
    """
    with staged(target) as folder:
        reader = open_source(source)
        config = ModelConfig.from_hf(reader.config)
        _check_blocks(config)
        reader.write_side_files(folder)
        writer = ShardWriter(folder, max_shard_bytes)
        linears = {f"{name}.weight" for name in config.linears()}
        total = len(config.tensors())
        for done, (name, tensor) in enumerate(reader.tensors()):
            if progress:
                progress("quantize", done, total)
            writer.add(_stored(name, tensor, name in linears, double_quant))
        writer.finish()
        write_config(folder, reader.config, double_quant)
        if progress:
            progress("quantize", total, total)
        return Checkpoint.open(folder).base_digest


def open_source(path: Path) -> Source:
    """A reader for `path`. Raises CheckpointError when it is neither a folder nor a GGUF file."""
    if path.is_dir():
        return HfSource(path)
    if path.is_file() and path.suffix == ".gguf":
        from loriner.model.gguf import GgufSource

        return GgufSource(path)
    raise CheckpointError(f"{path} is neither a Hugging Face folder nor a .gguf file.")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name on success and vanishes on failure."""
    check_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        for path in folder.iterdir():
            path.chmod(0o644)
            _sync(path)
        folder.chmod(0o755)
        _sync(folder)
        check_free(target)
        folder.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_free(target: Path) -> None:
    """Raises CheckpointError when `target` exists, unless it is an empty folder."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} exists already.")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_blocks(config: ModelConfig) -> None:
    for name, (_, inputs) in config.linears().items():
        if inputs % BLOCK:
            raise CheckpointError(
                f"{name} has {inputs} inputs, which is not a multiple of {BLOCK}."
            )


def _stored(name: str, tensor: Tensor, is_linear: bool, double_quant: bool) -> dict[str, Tensor]:
    # A copy, so that no mapped file of the source outlives its turn.
    dense = tensor.to(torch.bfloat16, copy=True)
    if not torch.isfinite(dense).all():
        raise CheckpointError(f"{name} has NaN or infinite values.")
    if is_linear:
        return to_tensors(name, quantize_nf4(dense, double_quant=double_quant))
    return {name: dense}


def write_config(folder: Path, source: dict[str, Any], double_quant: bool) -> None:
    dropped = ("auto_map", "torch_dtype")
    config = {k: v for k, v in source.items() if k not in dropped and not k.startswith("_")}
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        **QUANTIZATION_CONFIG,
        "bnb_4bit_use_double_quant": double_quant,
    }
    write_json(folder / "config.json", config)


class ShardWriter:
    """Collects tensors and writes a file whenever the next one would pass the limit."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.written: list[list[str]] = []

    def add(self, tensors: dict[str, Tensor]) -> None:
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if self.pending and self.pending_bytes + num_bytes > self.max_bytes:
            self._flush()
        self.pending |= tensors
        self.pending_bytes += num_bytes

    def finish(self) -> None:
        self._flush()
        count = len(self.written)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        names = [SINGLE] if count == 1 else names
        for i, name in enumerate(names):
            self._part(i).rename(self.folder / name)
        if count > 1:
            files = {t: name for name, part in zip(names, self.written, strict=True) for t in part}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": files}
            write_json(self.folder / INDEX, index)

    def _flush(self) -> None:
        save_file(self.pending, self._part(len(self.written)), metadata={"format": "pt"})
        self.written.append(sorted(self.pending))
        self.total_bytes += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self.folder / f"part-{index:05}"
