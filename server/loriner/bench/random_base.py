"""A random NF4 base of a named shape, made directly in quantised form: no download, no quantiser.

`RandomBase` is a `Checkpoint` whose tensors are drawn when they are asked for, on the device that
will compute, so nothing but what the loader keeps is ever resident. Invariant: a tensor depends on
its name, the seed and the kind of device alone. Scales are such that a product keeps the size of
its input.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from loriner.bench.shapes import hf_config
from loriner.errors import CheckpointError
from loriner.kernels.operands import NESTED_BLOCK, NestedScales
from loriner.model.config import ModelConfig
from loriner.model.nf4 import BLOCK, Quantized, dynamic_map, nf4_code
from loriner.model.storage import QuantState
from loriner.model.weights import Checkpoint

CODE_RMS = 0.5173  # of a uniformly drawn NF4 value
SPREAD = 0.5  # scales lie within this share of their mean


class RandomBase(Checkpoint):
    """The tensors of a random base by their Hugging Face names."""

    def __init__(
        self, shape: str, device: str = "cpu", *, seed: int = 0, double_quant: bool = True
    ) -> None:
        # Not the base class's __init__: there are no files. What it reads from them is set here.
        self.shape, self.device, self.seed = shape, torch.device(device), seed
        self.raw = hf_config(shape)
        self.path = Path(f"random-{shape}")
        self.config = ModelConfig.from_hf(self.raw)
        self.double_quant = double_quant
        self._dense = self.config.tensors()
        self._states = {
            f"{name}.weight": QuantState(size, _mean_scale(size[1]) if double_quant else None)
            for name, size in self.config.linears().items()
        }
        self._used = list(self._dense)
        self._code, self._map = nf4_code().to(self.device), dynamic_map().to(self.device)
        sizes = (math.prod(s) * 2 for n, s in self._dense.items() if n not in self._states)
        self.num_bytes = sum(sizes) + sum(map(nf4_bytes, self._states.values()))

    @cached_property
    def base_digest(self) -> str:
        """Names the recipe, not the bytes."""
        recipe = f"{self.shape} {self.seed} {self.double_quant} {self.device.type}"
        return hashlib.sha256(f"random base: {recipe}".encode()).hexdigest()

    def has(self, name: str) -> bool:
        return name in self._dense or self._is_part(name)

    def tensor(self, name: str) -> Tensor:
        """Drawn anew at each call. Safe to call from several threads."""
        if name in self._states:
            return self._codes(name)
        if name in self._dense:
            return self._values(name)
        if self._is_part(name):
            return self._part(name)
        raise CheckpointError(f"{self.path} has no tensor {name!r}.")

    def nested(self, name: str) -> NestedScales | None:
        """The scales of a linear as they are stored, by module name; None when not nested."""
        weight = f"{name}.weight"
        absmax = self._absmax(weight, self._states[weight])
        return absmax if isinstance(absmax, NestedScales) else None

    def quantized(self, name: str) -> Quantized:
        """A linear's weight as it is stored, by the weight's name."""
        absmax = self._absmax(name, self._states[name])
        return Quantized(self._packed(name), absmax, self._states[name].shape)

    def records(self) -> Iterator[tuple[str, QuantState | None]]:
        """(name, how it is quantised) of every tensor of the model."""
        for name in self._dense:
            yield name, self._states.get(name)

    def _is_part(self, name: str) -> bool:
        weight, _, part = name.rpartition(".")
        parts = ["absmax", "quant_map"]
        parts += ["nested_absmax", "nested_quant_map"] if self.double_quant else []
        return weight in self._states and part in parts

    def _draw(self, name: str) -> torch.Generator:
        generator = torch.Generator(self.device)
        return generator.manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))

    def _codes(self, name: str) -> Tensor:
        """[N*K/2, 1] u8, eight bytes at a time."""
        n, k = self._states[name].shape
        words = torch.empty(n * k // 16, dtype=torch.int64, device=self.device)
        words.random_(-(2**63), None, generator=self._draw(name))
        return words.view(torch.uint8).unsqueeze(1)

    def _values(self, name: str) -> Tensor:
        """Matrices of the size 1 / sqrt(inputs), norms near one, small biases; bf16."""
        size, is_norm = self._dense[name], name.endswith("norm.weight")
        values = torch.empty(size, dtype=torch.bfloat16, device=self.device)
        center = float(is_norm and not self.config.norm_offset)
        width = 1 / math.sqrt(size[1]) if len(size) == 2 else 0.1
        return values.normal_(center, width, generator=self._draw(name))

    def _part(self, name: str) -> Tensor:
        weight, _, part = name.rpartition(".")
        if part == "quant_map":
            return self._code
        if part == "nested_quant_map":
            return self._map
        state, draw = self._states[weight], self._draw(name)
        mean = _mean_scale(state.shape[1])
        if part == "absmax" and self.double_quant:
            index = torch.empty(state.num_blocks, dtype=torch.uint8, device=self.device)
            return index.random_(0, 256, generator=draw)
        count = -(-state.num_blocks // NESTED_BLOCK) if self.double_quant else state.num_blocks
        scales = torch.empty(count, dtype=torch.float32, device=self.device)
        low = 0.0 if self.double_quant else 1 - SPREAD
        return scales.uniform_(low * mean, (low + SPREAD) * mean, generator=draw)


def nf4_bytes(state: QuantState) -> int:
    """Bytes of one NF4 weight as it is stored: codes and scales."""
    scales = 4 * state.num_blocks
    if state.nested_offset is not None:
        scales = state.num_blocks + 4 * -(-state.num_blocks // NESTED_BLOCK)
    return state.num_blocks * BLOCK // 2 + scales


def _mean_scale(inputs: int) -> float:
    """Of weights whose root mean square is 1 / sqrt(inputs); an f32 value."""
    return torch.tensor(1 / (CODE_RMS * math.sqrt(inputs)), dtype=torch.float32).item()
