"""One model in three folders: dense bf16, NF4, NF4 with double quantisation; and how far apart.

Knows sources and folders, no training. Invariant: both NF4 folders are made from the dense one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loriner.kernels.operands import Nf4
from loriner.kernels.reference import dequantized
from loriner.model.quantize import MAX_SHARD_BYTES, ShardWriter, open_source, quantize, staged
from loriner.model.shards import read_json
from loriner.model.sources import Source, copy_side_files, write_json
from loriner.model.weights import Checkpoint

DENSE, NF4, NF4_DOUBLE = "dense", "nf4", "nf4-double"


@dataclass(frozen=True, slots=True)
class Bases:
    """The folders by kind, the share of the linears' length that NF4 is off, and a word about
    where the weights come from."""

    folders: dict[str, Path]
    errors: dict[str, float]
    origin: str


class Dequantized:
    """An NF4 folder as a dense source: what its bytes stand for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._checkpoint = Checkpoint.open(folder)
        raw = read_json(folder / "config.json")
        self.config = {k: v for k, v in raw.items() if k != "quantization_config"}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._checkpoint.config.tensors():
            yield name, dense_tensor(self._checkpoint, name)

    def write_side_files(self, target: Path) -> None:
        copy_side_files(self.folder, target)


def make_bases(source: Path, folder: Path) -> Bases:
    """Write what is not there yet below `folder`. Raises CheckpointError as `quantize` does."""
    folders = {kind: folder / kind for kind in (DENSE, NF4, NF4_DOUBLE)}
    reader, origin = _opened(source)
    if not folders[DENSE].exists():
        write_dense(folders[DENSE], reader.config, reader, reader.tensors())
    for kind in (NF4, NF4_DOUBLE):
        if not folders[kind].exists():
            quantize(folders[DENSE], folders[kind], double_quant=kind == NF4_DOUBLE)
    errors = {kind: weight_error(folders[DENSE], path) for kind, path in folders.items()}
    return Bases(folders, errors, origin)


def write_dense(
    target: Path, config: dict[str, Any], side: Source, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """A new Hugging Face folder in bf16, with the side files of `side`."""
    with staged(target) as folder:
        side.write_side_files(folder)
        writer = ShardWriter(folder, MAX_SHARD_BYTES)
        for name, tensor in tensors:
            writer.add({name: tensor.detach().to("cpu", torch.bfloat16, copy=True).contiguous()})
        writer.finish()
        kept = {k: v for k, v in config.items() if k != "torch_dtype"}
        write_json(folder / "config.json", {**kept, "dtype": "bfloat16"})


def weight_error(dense: Path, other: Path) -> float:
    """||W - Q|| / ||W|| over all linears together."""
    ours, theirs = Checkpoint.open(dense), Checkpoint.open(other)
    off = size = 0.0
    for name in ours.config.linears():
        weight = dense_tensor(ours, f"{name}.weight").float()
        off += (weight - dense_tensor(theirs, f"{name}.weight").float()).square().sum().item()
        size += weight.square().sum().item()
    return float((off / size) ** 0.5)


def dense_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of the dense model by its Hugging Face name; NF4 is decoded to f32."""
    if not name.endswith(".weight"):
        return checkpoint.tensor(name)
    weight = checkpoint.linear(name.removesuffix(".weight"))
    return dequantized(weight) if isinstance(weight, Nf4) else weight


def _opened(source: Path) -> tuple[Source, str]:
    if source.is_dir() and Checkpoint.open(source).is_quantized:
        return Dequantized(source), (
            "the dense weights are a stand-in, dequantised from an NF4 folder: quantising them "
            "again is nearly exact, so these figures show what training through NF4 costs and "
            "not what rounding a model to 4 bits costs"
        )
    if source.is_file():
        return open_source(source), (
            "the dense weights are decoded from a GGUF file: its own rounding is in every variant, "
            "that to NF4 in the QLoRA ones alone"
        )
    return open_source(source), "the dense weights are the source's, in bf16"
