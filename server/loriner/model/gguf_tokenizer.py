"""The tokenizer of a GGUF file as tokenizer.json: transformers' conversion, made llama.cpp's equal.

transformers knows how some vocabularies split text and falls back to GPT-2's way for the rest. Here
each `tokenizer.ggml.pre` is known or refused: text becomes the tokens the model was trained on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers, processors

from loriner.errors import CheckpointError

PRE = "tokenizer.ggml.pre"
MODEL = "tokenizer.ggml.model"
ADD_BOS = "tokenizer.ggml.add_bos_token"

# How llama.cpp treats each kind of byte-level vocabulary of the families we read.
DIGIT_BY_DIGIT = ("smollm",)
GPT2 = ("gpt-2",)
AS_CONVERTED = ("qwen2", "deepseek-r1-qwen", "llama-bpe", "llama3", "llama-v3", "tekken")
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")  # vocabulary before merges
BOS_UNLESS_TOLD = ("llama-bpe", "llama3", "llama-v3")


def write_tokenizer(path: Path, keys: Mapping[str, Any], target: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja of GGUF file `path`.

    `keys` are its metadata, `max_length` is the context in tokens. Raises CheckpointError for an
    unknown kind of tokenizer.
    """
    kind, pre = keys.get(MODEL), keys.get(PRE, "default")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{MODEL} {kind!r} is not supported, only 'gpt2' and 'llama'.")
    if kind == "gpt2" and pre not in (*DIGIT_BY_DIGIT, *GPT2, *AS_CONVERTED):
        raise CheckpointError(f"{PRE} {pre!r} is not supported.")
    tokenizer = _convert(path)
    if kind == "gpt2":
        _correct(tokenizer.backend_tokenizer, pre)
        if keys.get(ADD_BOS, pre in BOS_UNLESS_TOLD) and tokenizer.bos_token is not None:
            _prepend(tokenizer.backend_tokenizer, tokenizer.bos_token)
    tokenizer.save_pretrained(target)
    _clean(target / "tokenizer_config.json", max_length)


def _convert(path: Path) -> Any:
    """transformers' tokenizer for the file; its progress bars and advice stay off our terminal."""
    from transformers import AutoTokenizer
    from transformers.utils import logging as chatter

    level = chatter.get_verbosity()
    chatter.set_verbosity(logging.ERROR)
    try:
        return AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be converted: {error}") from error
    finally:
        chatter.set_verbosity(level)


def _correct(backend: Tokenizer, pre: str) -> None:
    if pre in DIGIT_BY_DIGIT:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if pre in WHOLE_WORDS_FIRST:
        backend.model.ignore_merges = True


def _prepend(backend: Tokenizer, token: str) -> None:
    """Begin every text with `token`, as the Hugging Face tokenizers of these families do."""
    template = processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token}:1 $B:1",
        special_tokens=[(token, backend.token_to_id(token))],
    )
    bytes_first = processors.ByteLevel(trim_offsets=False)
    backend.post_processor = processors.Sequence([bytes_first, template])


def _clean(path: Path, max_length: int) -> None:
    """Name a class that every transformers has; drop what describes the conversion."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
