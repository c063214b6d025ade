"""A tiny random base for tests: real config, real tokenizer, real NF4 bytes, made in milliseconds.

Every byte of UTF-8 is a token (id = byte), then <|im_start|> 256, <|im_end|> 257 (eos) and
<|endoftext|> 258; the rest of the vocabulary has no text. Weights are large: logits have gaps.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from loriner.model.config import ModelConfig
from loriner.model.quantize import quantize

IM_START, IM_END, END_OF_TEXT = 256, 257, 258
VOCAB_SIZE = 320

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
}


def write_tiny_base(
    folder: Path,
    *,
    family: str = "llama",
    seed: int = 0,
    double_quant: bool = True,
    **overrides: Any,
) -> Path:
    """Write a tiny NF4 base to `folder` and return it; `overrides` are keys of config.json."""
    with tempfile.TemporaryDirectory() as name:
        dense = write_tiny_dense(Path(name) / "dense", family=family, seed=seed, **overrides)
        quantize(dense, folder, double_quant=double_quant)
    return folder


def write_tiny_dense(
    folder: Path, *, family: str = "llama", seed: int = 0, **overrides: Any
) -> Path:
    """Write the same base as a dense bf16 Hugging Face folder."""
    folder.mkdir(parents=True)
    config = tiny_config(family, **overrides)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tiny_tensors(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def tiny_config(family: str = "llama", **overrides: Any) -> dict[str, Any]:
    """The config.json of the tiny base."""
    return {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "gelu_pytorch_tanh" if family == "gemma" else "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bos_token_id": IM_START,
        "eos_token_id": IM_END,
        "pad_token_id": IM_END,
        "dtype": "bfloat16",
        **overrides,
    }


def tiny_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random bf16 tensors for `config`; norms are near one."""
    generator = torch.Generator().manual_seed(seed)
    model = ModelConfig.from_hf(config)
    tensors = {}
    for name, shape in model.tensors().items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            values *= 2.4 / math.sqrt(shape[1])  # 0.3 for 64 inputs
        elif name.endswith(".bias"):
            values *= 0.3
        else:
            values = values * 0.1 + (0.0 if model.norm_offset else 1.0)
        tensors[name] = values.to(torch.bfloat16)
    return tensors


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json with a ChatML template, and generation_config.json."""
    make_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": IM_START, "eos_token_id": [IM_END], "pad_token_id": IM_END}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges."""
    vocab = {char: byte for byte, char in byte_alphabet().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return tokenizer


def byte_alphabet() -> dict[int, str]:
    """GPT-2's spelling of the 256 bytes: printable ones as they are, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable}
    return spelled | {byte: chr(256 + i) for i, byte in enumerate(others)}
