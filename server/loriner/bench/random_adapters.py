"""Random adapters over all seven linears, a thousand of them in seconds: windows of one pool.

Each adapter reads the pool from a place of its own, so all differ and none costs host memory; on a
device each is a copy. Knows no engine. Invariant: adapter `i` of a collection is always the same
numbers, and `generation(i)` names them in this process alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from loriner.adapters.adapter import Adapter, LoraWeight
from loriner.bench.random_base import RandomBase
from loriner.model.config import ATTENTION, MLP, ModelConfig

POOL = 1 << 22  # numbers; more than the largest tensor of rank 64 takes is added
STRIDE = 128  # windows begin at multiples of it: 256 bytes
SIZE = 1 / 64  # of a number: A x of a normed x is about one, and B moves the output by a tenth
TARGETS = (*ATTENTION, *MLP)


def draw(args: argparse.Namespace) -> tuple[RandomBase, RandomAdapters]:
    """The base and the adapters of a benchmark, by its flags: shape, device, ranks and seed."""
    base = RandomBase(args.shape, args.device, seed=args.seed)
    return base, RandomAdapters(base.config, args.ranks, seed=args.seed)


class RandomAdapters:
    """Adapters of `ranks`, taken in turns: number i has ranks[i % len(ranks)]."""

    def __init__(self, config: ModelConfig, ranks: Sequence[int], *, seed: int = 0) -> None:
        self.config, self.ranks, self.seed = config, tuple(ranks), seed
        self._linears = config.linears()
        widest = max(max(shape) for shape in self._linears.values()) * max(ranks)
        draw = torch.Generator().manual_seed(seed)
        size = POOL + widest
        self._pool = torch.randn(size, generator=draw).mul_(SIZE).bfloat16()

    def rank(self, index: int) -> int:
        return self.ranks[index % len(self.ranks)]

    def generation(self, index: int) -> str:
        """A name of 64 hex digits; `index_of` undoes it."""
        return f"{index:064x}"

    def num_bytes(self, index: int) -> int:
        """Bytes of its A and B, which a step that uses it must read."""
        return adapter_bytes(self.config, self.rank(index))

    def adapter(self, index: int) -> Adapter:
        """Its tensors are views of the pool."""
        rank = self.rank(index)
        modules = {}
        for place, (name, (n, k)) in enumerate(self._linears.items()):
            a = self._window(index, 2 * place, rank, k)
            b = self._window(index, 2 * place + 1, n, rank)
            modules[name] = LoraWeight(a, b, None, 2.0)
        return Adapter(self.generation(index), MappingProxyType(modules))

    def load(self, generation: str) -> Adapter:
        return self.adapter(index_of(generation))

    def write(self, index: int, folder: Path) -> Path:
        """The adapter as PEFT writes it, in the new folder `folder`."""
        from safetensors.torch import save_file

        tensors = {}
        for name, weight in self.adapter(index).modules.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = weight.a
            tensors[f"base_model.model.{name}.lora_B.weight"] = weight.b
        folder.mkdir(parents=True)
        # Views of one pool may not share storage in a file: save_file wants each on its own.
        whole = {key: tensor.clone() for key, tensor in tensors.items()}
        save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(peft_config(self.rank(index))))
        return folder

    def _window(self, index: int, place: int, rows: int, columns: int) -> Tensor:
        num_starts = (self._pool.numel() - rows * columns) // STRIDE
        # Steps by primes: neighbours in index or place do not overlap for long.
        start = (index * 7919 + place * 104729) % num_starts * STRIDE
        return self._pool[start : start + rows * columns].view(rows, columns)


def index_of(generation: str) -> int:
    return int(generation, 16)


def adapter_bytes(config: ModelConfig, rank: int) -> int:
    """Bytes of A and B in bf16 over all seven linears."""
    return sum(2 * rank * (n + k) for n, k in config.linears().values())


def peft_config(rank: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": list(TARGETS),
    }
