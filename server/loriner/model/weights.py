"""`Checkpoint`: an opened base folder, ours or one that transformers and bitsandbytes wrote.

Knows files and layouts, no maths beyond the scales. Invariant: a folder that opens has every tensor
of its config in the right shape and nothing that the decoder would ignore; tensors are mapped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loriner.errors import CheckpointError
from loriner.kernels.operands import NestedScales, Nf4
from loriner.model import digest
from loriner.model.config import ModelConfig, token_ids
from loriner.model.shards import Header, Shards, read_json
from loriner.model.storage import NESTED_PARTS, PARTS, STATE, QuantState

DENSE_DTYPES = ("F32", "F16", "BF16")


class Checkpoint:
    """The tensors of one base by their Hugging Face names."""

    def __init__(self, path: Path, config: ModelConfig, shards: Shards) -> None:
        """Use `open`; raises CheckpointError when the tensors are not those of `config`."""
        self.path = path
        self.config = config
        self._shards = shards
        headers = shards.headers()
        self._states = _quant_states(shards, headers)
        self._used = _check_inventory(config, headers, self._states)
        self.num_bytes = sum(header.num_bytes for header in headers.values())

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a folder with config.json and safetensors. Raises CheckpointError saying why not."""
        raw = read_json(path / "config.json")
        _check_quantization(raw.get("quantization_config"))
        config = ModelConfig.from_hf(raw)
        if (path / "generation_config.json").is_file():
            generation = read_json(path / "generation_config.json")
            ids = (*token_ids(generation.get("eos_token_id")), *config.eos_token_ids)
            config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(ids)))
        return cls(path, config, Shards.open(path))

    def has(self, name: str) -> bool:
        """Whether a tensor of this name (".weight" and all) is stored."""
        return name in self._shards.file_of

    def tensor(self, name: str) -> Tensor:
        """A stored tensor as it is; backed by the file, so don't write to it."""
        if not self.has(name):
            raise CheckpointError(f"{self.path} has no tensor {name!r}.")
        return self._shards.get(name)

    def dense(self, name: str) -> Tensor | None:
        """The tensor of this name if it is stored dense, lm_head.weight of a tied base included."""
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        return self.tensor(name) if self.has(name) and name not in self._states else None

    def linear(self, name: str) -> Nf4 | Tensor:
        """The weight [N, K] of a linear, by module name; a tied lm_head is the embedding."""
        if name == "lm_head" and self.config.tie_word_embeddings:
            return self.tensor("model.embed_tokens.weight")
        weight = f"{name}.weight"
        state = self._states.get(weight)
        if state is None:
            return self.tensor(weight)
        code = self.tensor(f"{weight}.quant_map").flatten()
        return Nf4(self._packed(weight), self._absmax(weight, state), code, state.shape)

    @property
    def is_quantized(self) -> bool:
        """Whether any linear is stored as NF4."""
        return bool(self._states)

    @cached_property
    def base_digest(self) -> str:
        """64 hex digits naming these weights (see `digest`); reads every byte when not cached."""
        files = self._shards.files
        known = digest.read_cache(self.path, files)
        if known is None:
            known = digest.compute(self._records())
            digest.write_cache(self.path, files, known)
        return known

    def _packed(self, weight: str) -> Tensor:
        return self.tensor(weight).flatten().view(torch.uint8)

    def _absmax(self, weight: str, state: QuantState) -> Tensor | NestedScales:
        absmax = self.tensor(f"{weight}.absmax").flatten()
        if state.nested_offset is None:
            return absmax
        scales, code = (self.tensor(f"{weight}.{part}").flatten() for part in NESTED_PARTS)
        return NestedScales(absmax, scales, code, state.nested_offset)

    def _records(self) -> Iterator[digest.Record]:
        for name in sorted(self._used):
            state = self._states.get(name)
            if state is None:
                tensor = self.tensor(name)
                kind = str(tensor.dtype).removeprefix("torch.")
                yield digest.Record(name, kind, tuple(tensor.shape), (tensor,))
            else:
                yield self._quantized_record(name, state)

    def _quantized_record(self, name: str, state: QuantState) -> digest.Record:
        packed, code = self._packed(name), self.tensor(f"{name}.quant_map")
        absmax = self._absmax(name, state)
        if isinstance(absmax, NestedScales):
            offset = torch.tensor([absmax.offset], dtype=torch.float32)
            parts = (packed, absmax.index, absmax.absmax, absmax.code, offset, code)
            return digest.Record(name, "nf4-nested", state.shape, parts)
        return digest.Record(name, "nf4", state.shape, (packed, absmax, code))


def is_redundant(name: str, config: ModelConfig) -> bool:
    """Tensors that some folders carry and no model uses: rotary tables, a tied lm_head."""
    tied = config.tie_word_embeddings and name == "lm_head.weight"
    return tied or name.endswith(".rotary_emb.inv_freq")


def check_names(config: ModelConfig, names: set[str]) -> None:
    """Raises CheckpointError unless `names` are the tensors of `config`, redundant ones aside."""
    expected = set(config.tensors())
    if missing := sorted(expected - names):
        raise CheckpointError(f"{_some(missing)} is missing for a {config.architecture} model.")
    unused = sorted(n for n in names - expected if not is_redundant(n, config))
    if unused:
        raise CheckpointError(f"{_some(unused)} has no place in a {config.architecture} model.")


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _check_quantization(quantization: Mapping[str, Any] | None) -> None:
    if not quantization:
        return
    method = quantization.get("quant_method")
    kind = quantization.get("bnb_4bit_quant_type", "nf4")
    if method != "bitsandbytes":
        raise CheckpointError(
            f"quantization method {method!r} is not supported, only bitsandbytes NF4."
        )
    if not quantization.get("load_in_4bit", quantization.get("_load_in_4bit")) or kind != "nf4":
        raise CheckpointError("bitsandbytes without load_in_4bit and type nf4 is not supported.")


def _quant_states(shards: Shards, headers: Mapping[str, Header]) -> dict[str, QuantState]:
    states = {}
    for key in headers:
        if key.endswith(f".{STATE}"):
            name = key.removesuffix(f".{STATE}")
            state = QuantState.parse(name, bytes(shards.get(key).numpy()))
            state.check(name, headers)
            states[name] = state
    return states


def _check_inventory(
    config: ModelConfig, headers: Mapping[str, Header], states: Mapping[str, QuantState]
) -> list[str]:
    """The names in use. Raises CheckpointError for anything missing, misshapen or unused."""
    parts = {f"{name}.{part}" for name in states for part in (*PARTS, *NESTED_PARTS)}
    check_names(config, set(headers) - parts)
    expected = config.tensors()
    linears = {f"{name}.weight" for name in (*config.linears(), "lm_head")}
    for name, shape in expected.items():
        header, state = headers[name], states.get(name)
        if state is not None and name not in linears:
            raise CheckpointError(f"{name} is quantised; only linears may be.")
        found = header.shape if state is None else state.shape
        if found != shape:
            raise CheckpointError(f"{name} has shape {list(found)}, expected {list(shape)}.")
        if state is None and header.dtype not in DENSE_DTYPES:
            raise CheckpointError(
                f"{name} has dtype {header.dtype}, expected one of {DENSE_DTYPES}."
            )
    return list(expected)
