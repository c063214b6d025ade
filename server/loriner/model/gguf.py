"""A GGUF file of the Llama family as a dense source: config and weights under Hugging Face names.

Knows llama.cpp's key and tensor names; the tokenizer is `gguf_tokenizer.py`'s. Tensors are mapped,
dequantised one at a time. Invariant: a key that changes the maths is honoured or refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from loriner.errors import CheckpointError
from loriner.model.config import ModelConfig
from loriner.model.gguf_tokenizer import write_tokenizer
from loriner.model.sources import write_json
from loriner.model.weights import check_names

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"

KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}
HANDLED = {
    "attention.value_length",
    "expert_count",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
}
TOKEN_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
END_OF_TURN = "tokenizer.ggml.eot_token_id"
VOCABULARY = ("tokens", "merges", "scores", "token_type")  # long, and transformers reads them


Values = np.ndarray[Any, np.dtype[np.float32]]


class GgufSource:
    """One GGUF file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when the file is malformed or not of a supported family."""
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from error
        self.keys = {
            name: field.contents()
            for name, field in self.reader.fields.items()
            if name.rpartition(".")[-1] not in VOCABULARY
        }
        self.stored = {tensor.name: tensor for tensor in self.reader.tensors}
        self.config = _config(self.keys, self.stored)
        self.model = ModelConfig.from_hf(self.config)
        self.names = {_hf_name(name): name for name in self.stored if name != ROPE_FACTORS}
        check_names(self.model, set(self.names))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, shape in self.model.tensors().items():
            values = self._dequantize(self.names[name])
            if self.config["model_type"] == "llama" and ".self_attn." in name:
                values = self._unpermute(name, values)
            if values.shape != shape:
                raise CheckpointError(
                    f"{name} has shape {list(values.shape)}, expected {list(shape)}."
                )
            yield name, torch.from_numpy(values)

    def write_side_files(self, target: Path) -> None:
        write_tokenizer(self.path, self.keys, target, self.model.max_position_embeddings)
        ids = {key: self.config[key] for key in TOKEN_KEYS.values() if key in self.config}
        turn = self.keys.get(END_OF_TURN)
        if turn is not None and turn != ids.get("eos_token_id"):
            ids["eos_token_id"] = [i for i in (ids.get("eos_token_id"), turn) if i is not None]
        write_json(target / "generation_config.json", ids)

    def _dequantize(self, name: str) -> Values:
        tensor = self.stored[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise CheckpointError(f"{name}: GGUF type {kind} cannot be read ({error}).") from error
        values = values.astype(np.float32, copy=False)
        return values if values.flags.writeable else values.copy()

    def _unpermute(self, name: str, values: Values) -> Values:
        """llama.cpp interleaves the two halves of each rotary head of q and k: put them back."""
        heads = {"q_proj": self.model.num_heads, "k_proj": self.model.num_kv_heads}
        count = heads.get(name.split(".")[-2])
        if count is None or values.shape[0] % (2 * count):
            return values
        halves = values.reshape(count, -1, 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _config(keys: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The Hugging Face config that the keys and tensors of a file describe."""
    architecture = keys.get("general.architecture")
    if architecture not in CLASSES:
        known = ", ".join(CLASSES)
        raise CheckpointError(f"GGUF architecture {architecture!r} is not one of {known}.")
    own = _own_keys(architecture, keys)
    config = {hf: _number(own[key]) for key, hf in KEYS.items() if key in own}
    if "token_embd.weight" in stored:
        config["vocab_size"] = int(stored["token_embd.weight"].shape[1])
    config |= {
        hf: keys[f"tokenizer.ggml.{name}_token_id"]
        for name, hf in TOKEN_KEYS.items()
        if f"tokenizer.ggml.{name}_token_id" in keys
    }
    config |= {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in stored,
        "rope_parameters": _rope(own, stored),
    }
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in stored
    head_dim = config.setdefault(
        "head_dim", config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise CheckpointError(f"{key} {own[key]} differs from the head size {head_dim}.")
    return config


def _own_keys(architecture: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys under `architecture.`. Raises CheckpointError for one that we do not know."""
    prefix = f"{architecture}."
    own = {k.removeprefix(prefix): v for k, v in keys.items() if k.startswith(prefix)}
    if unknown := sorted(set(own) - set(KEYS) - HANDLED):
        raise CheckpointError(f"GGUF key {prefix}{unknown[0]} is not supported.")
    if own.get("expert_count"):
        raise CheckpointError("mixtures of experts (expert_count) are not supported.")
    return own


def _number(value: Any) -> Any:
    """A float key is an f32: the shortest decimal that names it, 1e-05 and not 9.9999997e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope(own: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    theta = _number(own.get("rope.freq_base", 10000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = own.get("rope.scaling.type", "none")
    if ROPE_FACTORS in stored:
        return rope | _llama3(theta, np.asarray(stored[ROPE_FACTORS].data, dtype=np.float32))
    if kind == "none":
        return rope
    rope |= {"rope_type": kind, "factor": _number(own.get("rope.scaling.factor"))}
    if original := own.get("rope.scaling.original_context_length"):
        rope["original_max_position_embeddings"] = original
    return rope


def _llama3(theta: float, factors: Values) -> dict[str, Any]:
    """Recognise the published Llama-3 scalings by the divisors that llama.cpp stores for them."""
    for factor in (8.0, 32.0):
        scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        expected = [_llama3_divisor(theta, i / len(factors), factor) for i in range(len(factors))]
        if np.allclose(factors, expected, rtol=1e-4):
            return {"rope_type": "llama3", "original_max_position_embeddings": 8192, **scaling}
    raise CheckpointError(f"{ROPE_FACTORS} holds a rope scaling that is not Llama 3's.")


def _llama3_divisor(theta: float, exponent: float, factor: float) -> float:
    wavelength = 2 * math.pi * math.pow(theta, exponent)
    if wavelength < 8192 / 4:
        return 1.0
    if wavelength > 8192:
        return factor
    smooth = (8192 / wavelength - 1) / (4 - 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _hf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in TOP and kind == "weight":
        return f"{TOP[stem]}.{kind}"
    match = LAYER_NAME.fullmatch(name)
    if match and match[2] in IN_LAYER:
        return f"model.layers.{match[1]}.{IN_LAYER[match[2]]}.{match[3]}"
    raise CheckpointError(f"GGUF tensor {name!r} is not supported.")
