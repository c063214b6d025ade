"""How bitsandbytes lays one NF4 weight out in safetensors: names, tensors and the JSON beside them.

`X.weight` is U8 [N*K/2, 1], the nibbles (or another dtype with the same bytes), and has beside it
`.absmax` F32 [N*K/64] (U8 when nested), `.quant_map` F32 [16], `.quant_state.bitsandbytes__nf4` U8
(JSON), and when nested `.nested_absmax` F32 [N*K/64/256] and `.nested_quant_map` F32 [256].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loriner.errors import CheckpointError
from loriner.kernels.operands import NESTED_BLOCK, NestedScales
from loriner.model.nf4 import BLOCK, Quantized, dynamic_map, nf4_code
from loriner.model.shards import Header

STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", STATE)
NESTED_PARTS = ("nested_absmax", "nested_quant_map")

# What transformers writes for NF4; float32 makes it compute as exactly as we do, bf16 inputs too.
QUANTIZATION_CONFIG: Mapping[str, Any] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": ["lm_head"],
    "llm_int8_threshold": 6.0,
}


@dataclass(frozen=True, slots=True)
class QuantState:
    """The JSON part of one NF4 weight, checked."""

    shape: tuple[int, int]
    nested_offset: float | None  # None: the scales are not nested

    @property
    def num_blocks(self) -> int:
        return self.shape[0] * self.shape[1] // BLOCK

    @classmethod
    def parse(cls, name: str, raw: bytes) -> QuantState:
        """Raises CheckpointError, naming the weight and the value, for anything but NF4 by 64."""
        try:
            state = json.loads(raw)
            shape = tuple(int(size) for size in state["shape"])
            values = state["quant_type"], state["blocksize"], state.get("nested_blocksize")
            offset = None if values[2] is None else float(state["nested_offset"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{name}: its quant_state is malformed ({error!r}).") from error
        if values not in (("nf4", BLOCK, None), ("nf4", BLOCK, NESTED_BLOCK)):
            raise CheckpointError(
                f"{name}: quant_type {values[0]!r} in blocks of {values[1]}, scales in blocks of "
                f"{values[2]}; supported is 'nf4' by {BLOCK}, scales by {NESTED_BLOCK} or plain."
            )
        if len(shape) != 2 or shape[1] % BLOCK:
            raise CheckpointError(
                f"{name}: shape {shape} is not [N, K] with K a multiple of {BLOCK}."
            )
        return cls((shape[0], shape[1]), offset)

    def check(self, name: str, headers: Mapping[str, Header]) -> None:
        """Raises CheckpointError when a part is missing or is not as large as the shape asks."""
        nested = self.nested_offset is not None
        expected = {
            "": self.shape[0] * self.shape[1] // 2,
            ".absmax": self.num_blocks * (1 if nested else 4),
            ".quant_map": 64,
        }
        if nested:
            expected[".nested_absmax"] = -(-self.num_blocks // NESTED_BLOCK) * 4
            expected[".nested_quant_map"] = 1024
        for suffix, num_bytes in expected.items():
            header = headers.get(name + suffix)
            if header is None:
                raise CheckpointError(f"{name}{suffix} is missing.")
            if header.num_bytes != num_bytes:
                found = f"{header.num_bytes} bytes, expected {num_bytes}"
                raise CheckpointError(f"{name}{suffix} has {found} for shape {self.shape}.")


def to_tensors(name: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors to store for `name` (with ".weight")."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    tensors = {name: weight.packed.unsqueeze(1), f"{name}.quant_map": nf4_code()}
    if isinstance(weight.absmax, NestedScales):
        nested = weight.absmax
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": nested.offset,
        }
        tensors[f"{name}.absmax"] = nested.index
        tensors[f"{name}.nested_absmax"] = nested.absmax
        tensors[f"{name}.nested_quant_map"] = dynamic_map()
    else:
        tensors[f"{name}.absmax"] = weight.absmax
    tensors[f"{name}.{STATE}"] = torch.frombuffer(
        bytearray(json.dumps(state).encode()), dtype=torch.uint8
    )
    return tensors
