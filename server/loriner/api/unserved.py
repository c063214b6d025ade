"""Fields that OpenAI or another server knows and we do not serve: refused by name, never ignored.

Each row lists the values that ask for nothing and are let through. What is harmless whatever it
says (user, metadata, service_tier, ...) is not here. Invariant: no field here can change an answer
in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from loriner.errors import InvalidRequestError

_COMMON: Mapping[str, tuple[object, ...]] = {
    "store": (False,),
    "moderation": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
    "stop_regex": (),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "cache_salt": (),
    "request_id": (),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "kv_transfer_params": (),
    "session_params": (),
    "lora_path": (),
    "lora_name": (),
    "lora_request": (),
    "lora": ([],),
    "adapters": ([],),
    "adapter_id": (),
    "adapter_source": (),
    "merged_adapters": (),
}

_ALL_THAT_NAME = (
    "lora_path",
    "lora_name",
    "lora_request",
    "lora",
    "adapters",
    "adapter_id",
    "adapter_source",
    "merged_adapters",
)
_ALL_THAT_RUN = (
    "truncate_prompt_tokens",
    "cache_salt",
    "request_id",
    "kv_transfer_params",
    *_ALL_THAT_NAME,
)

CHAT: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        **_COMMON,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "chat_template": (),
        "documents": ([],),
        "mm_processor_kwargs": ({},),
    }
)

# Of chat's fields those that have no place in a response, or have another name there.
RESPONSES: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        **_COMMON,
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "background_options": (),
        "access_programs": (),
        "image": (),
        "include": ([],),
        "prompt": (),
        "max_tool_calls": (),
        "context_management": ([],),
        "truncation": ("disabled",),
        "top_logprobs": (0,),
        "logprobs": (False,),
        "prompt_logprobs": (),
        "stream_options": ({"include_obfuscation": False}, {}),
        "messages": (),
        "max_tokens": (),
        "max_completion_tokens": (),
        "reasoning_effort": (),
        "response_format": (),
        "n": (1,),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "echo": (False,),
        "add_special_tokens": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "chat_template": (),
        "documents": ([],),
    }
)

COMPLETION: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {**_COMMON, "reasoning_effort": ("none",), "suffix": ("",), "prompt_embeds": ()}
)

EMBEDDING: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        **{name: _COMMON[name] for name in _ALL_THAT_RUN},
        "messages": (),
        "chat_template": (),
        "input_type": (),
        "task": (),
        "task_type": (),
        "instruction": (),
        "late_chunking": (False,),
        "normalize": (True,),
        "normalized": (True,),
        "embed_dtype": ("float32",),
        "embedding_type": ("float",),
        "embedding_types": (["float"],),
        "output_dtype": ("float",),
        "endianness": ("native", "little"),
        "use_activation": (True,),
        "mm_processor_kwargs": ({},),
        "rid": (),
        "bootstrap_host": (),
    }
)

NAMING: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {name: _COMMON[name] for name in _ALL_THAT_NAME}
)

TOKENIZE: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        **NAMING,
        "truncate_prompt_tokens": (),
        "chat_template": (),
        "documents": ([],),
        "mm_processor_kwargs": ({},),
    }
)

_HINTS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        ("lora_path", "lora_name", "lora_request", "lora", "adapters", "adapter_id"),
        " Name one adapter in `adapter` or in `model`.",
    )
    | {
        other: f" Use `structured_outputs.{ours}`."
        for ours, others in {
            "json": ("guided_json", "json_schema"),
            "regex": ("guided_regex", "regex"),
            "choice": ("guided_choice",),
            "grammar": ("guided_grammar", "ebnf"),
        }.items()
        for other in others
    }
    | {
        "messages": " Use `input`.",
        "max_tokens": " Use `max_output_tokens`.",
        "max_completion_tokens": " Use `max_output_tokens`.",
        "response_format": " Use `text.format`.",
        "previous_response_id": " Nothing is stored: send the whole conversation in `input`.",
    }
)


def refuse_unserved(data: Mapping[str, Any], table: Mapping[str, tuple[object, ...]]) -> None:
    """Raises InvalidRequestError with `param` for the first field that asks for what we lack."""
    for name in data:
        if name not in table or _is_among(data[name], table[name]):
            continue
        what = "This value of" if table[name] else "The parameter"
        hint = _HINTS.get(name, "")
        raise InvalidRequestError(f"{what} '{name}' is not served.{hint}", name)


def _is_among(value: object, harmless: tuple[object, ...]) -> bool:
    return any(type(value) is type(other) and value == other for other in harmless)
