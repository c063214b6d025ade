"""Module tables and adapters for the tests of this room: real folders, and ones made to measure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from loriner.adapters.store import Store

TESTS = Path(__file__).resolve().parents[1]
PEFT_FOLDERS = TESTS / "data" / "adapters"
SHARED = TESTS.parents[1] / "shared" / "adapters"

Modules = dict[str, tuple[int, int]]
Make = Callable[[int], Path]

BASE = "b" * 64
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def module_table(hidden: int, inner: int, narrow: int, num_layers: int, vocab: int) -> Modules:
    """What `ModelConfig.modules()` gives for a Llama; `narrow` is the width of k and v."""
    table: Modules = {}
    for i in range(num_layers):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            table[f"model.layers.{i}.{name}"] = shape
    return table | {"lm_head": (vocab, hidden), "model.embed_tokens": (vocab, hidden)}


TINY = module_table(16, 32, 8, 3, 48)
SMOLLM2 = module_table(576, 1536, 192, 30, 49152)


def config(**changes: Any) -> dict[str, Any]:
    """A config as PEFT writes it; a change to `...` drops the key."""
    keys = json.loads((PEFT_FOLDERS / "attn-r4" / "adapter_config.json").read_text())
    keys |= {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 4} | changes
    return {key: value for key, value in keys.items() if value is not ...}


def tensors(
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    rank: int = 2,
    *,
    modules: Mapping[str, tuple[int, int]] = TINY,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random lora_A and lora_B of every linear in `modules` with one of these short names."""
    random = torch.Generator().manual_seed(seed)
    result: dict[str, Tensor] = {}
    for name, (num_out, num_in) in modules.items():
        if name.rpartition(".")[2] in targets:
            key = f"base_model.model.{name}"
            a = torch.randn(rank, num_in, generator=random) / math.sqrt(num_in)
            b = torch.randn(num_out, rank, generator=random)
            result |= {f"{key}.lora_A.weight": a.to(dtype), f"{key}.lora_B.weight": b.to(dtype)}
    return result


def write_adapter(
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
    keys: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> Path:
    """Write an adapter for TINY; `seed` alone makes different weights under the same config."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = tensors(seed=seed) if weights is None else weights
    save_file(dict(weights), folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config() if keys is None else keys))
    return folder


def raw_safetensors(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this header as it stands."""
    return len(header).to_bytes(8, "little") + header + data


def stored(store: Store) -> set[str]:
    """The generations that have files."""
    return {folder.name for folder in (store.root / "generations").iterdir()}


def leftovers(store: Store) -> list[Path]:
    """Files of uploads that are not over."""
    return [path for path in (store.root / "incoming").glob("*/**/*") if path.is_file()]
