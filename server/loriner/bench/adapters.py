"""Random adapters in PEFT's format: rank 8 on all seven linears, each with its own weights.

Knows the base only by its config.json. B is small but not zero, so an adapter changes the answer.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RANK = 8
ALPHA = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapters(model: Path, target: Path, count: int) -> list[Path]:
    """Write `count` adapters for the base in `model` as folders of `target`; return the folders."""
    shapes = linear_shapes(json.loads((model / "config.json").read_text()))
    folders = []
    for index in range(count):
        random = np.random.default_rng(index)
        tensors = {}
        for name, (num_out, num_in) in shapes.items():
            key = f"base_model.model.{name}"
            a = random.standard_normal((RANK, num_in)) / num_in**0.5
            tensors[f"{key}.lora_A.weight"] = a.astype(np.float32)
            b = random.standard_normal((num_out, RANK)) * 0.02
            tensors[f"{key}.lora_B.weight"] = b.astype(np.float32)
        folder = target / f"random-{index}"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(_config(), indent=2))
        folders.append(folder)
    return folders


def linear_shapes(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Module name -> (outputs, inputs) of every linear in the decoder layers."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // num_heads
    wide, narrow = num_heads * head_dim, config.get("num_key_value_heads", num_heads) * head_dim
    layer = {
        "self_attn.q_proj": (wide, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, wide),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    num_layers = config["num_hidden_layers"]
    return {f"model.layers.{i}.{name}": s for i in range(num_layers) for name, s in layer.items()}


def _config() -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": list(TARGETS),
    }
