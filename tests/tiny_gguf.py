"""A tiny GGUF file for tests, as llama.cpp's converter makes one: q and k permuted, mixed types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from tests.tiny import CHAT_TEMPLATE, IM_END, IM_START, byte_alphabet, tiny_config, tiny_tensors

Type = gguf.GGMLQuantizationType

# Rotating over the matrices, so that each kind of projection meets several types.
TYPES = (Type.Q4_1, Type.Q8_0, Type.F16, Type.F32, Type.BF16)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_tiny_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    merges: tuple[str, ...] = ("Ġ Ġ", "h i", "1 2"),
    keys: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    **overrides: Any,
) -> Path:
    """Write a tiny model; `keys` are more metadata, `tensors` more raw F32 tensors."""
    config = tiny_config(architecture, **overrides)
    writer = gguf.GGUFWriter(path, architecture)
    _write_keys(writer, architecture, config)
    _write_tokenizer(writer, pre, merges, config["vocab_size"])
    for key, value in (keys or {}).items():
        _write_key(writer, key, value)
    for i, (name, tensor) in enumerate(sorted(tiny_tensors(config).items())):
        values = tensor.float().numpy()
        if architecture == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            values = permute(values, config["num_attention_heads"], config["num_key_value_heads"])
        _write_tensor(writer, gguf_name(name), values, TYPES[i % len(TYPES)])
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(values: Any, num_heads: int, num_kv_heads: int) -> Any:
    """llama.cpp's order of the rows of q and k: the two halves of each head interleaved."""
    heads = num_heads if values.shape[0] == num_heads * 16 else num_kv_heads
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, index, rest = stem.split(".", 3)
        return f"blk.{index}.{NAMES[rest]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def _write_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_float32(key, value)


def _write_keys(writer: gguf.GGUFWriter, architecture: str, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if architecture == "llama":
        writer.add_rope_dimension_count(config["head_dim"])
    else:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])


def _write_tokenizer(
    writer: gguf.GGUFWriter, pre: str, merges: tuple[str, ...], vocab_size: int
) -> None:
    specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = [*(byte_alphabet()[byte] for byte in range(256)), *specials, *merged]
    unused = [f"unused{i}" for i in range(vocab_size - len(tokens))]
    kinds = [1] * 256 + [3] * len(specials) + [1] * len(merged) + [5] * len(unused)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types(kinds)
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(IM_START)
    writer.add_eos_token_id(IM_END)
    writer.add_unk_token_id(IM_END + 1)
    writer.add_pad_token_id(IM_END)
    writer.add_chat_template(CHAT_TEMPLATE)


def _write_tensor(writer: gguf.GGUFWriter, name: str, values: Any, kind: Type) -> None:
    if values.ndim == 1:
        kind = Type.F32
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
