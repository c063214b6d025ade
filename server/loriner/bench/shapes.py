"""The shapes of known models as Hugging Face configs, without their weights.

Knows numbers alone. Every shape has the token ids of the tokenizer that `random_base` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loriner.errors import ConfigError

BOS, EOS, END_OF_TEXT = 256, 257, 258

_LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "dtype": "bfloat16",
}


def _llama(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        **_LLAMA,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        **more,
    }


_LLAMA_3 = {"rope_theta": 500000.0, "max_position_embeddings": 8192}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
}
_SMOLLM2 = {
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, **_LLAMA_3),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
    "qwen3-4b": _llama(2560, 9728, 36, 32, 8, 151936, **_QWEN3),
    "smollm2": _llama(576, 1536, 30, 9, 3, 49152, **_SMOLLM2),
    "tiny": _llama(128, 256, 2, 2, 1, 512),  # for tests: milliseconds on any machine
}


def hf_config(shape: str) -> dict[str, Any]:
    """The config.json of a shape. Raises ConfigError for an unknown name."""
    if shape not in SHAPES:
        raise ConfigError(f"shape: {shape!r} is unknown; known are {', '.join(SHAPES)}.")
    return dict(SHAPES[shape])
