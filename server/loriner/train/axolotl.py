"""Axolotl's YAML, the QLoRA subset, as our settings. Knows names and values, no files.

Rows of `type: alpaca` become chats of the base's own template, as all such rows do here; those of
`type: completion` are plain text, whatever other keys they have.

Invariant: a key comes out translated, or checked to ask for what is done anyway, or by name in the
list of those that cannot be honoured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loriner.errors import ConfigError

_DATA_TYPES = ("chat_template", "alpaca", "sharegpt", "completion", "input_output", None)
_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
}
_RENAMED = {
    "base_model": "base",
    "output_dir": "out",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "peft_use_rslora": "rslora",
    "sequence_len": "max_length",
    "sample_packing": "packing",
    "micro_batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "noisy_embedding_alpha": "neftune",
    "neftune_noise_alpha": "neftune",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "evals_per_epoch": "evals_per_epoch",
    "saves_per_epoch": "saves_per_epoch",
    "early_stopping_patience": "early_stopping",
    "seed": "seed",
}
# Keys that may stand there as long as they ask for what is done anyway, or for nothing.
_DONE_ANYWAY: Mapping[str, tuple[object, ...]] = {
    "adapter": ("qlora", None),  # without one: see `translate`
    "load_in_4bit": (True,),
    "load_in_8bit": (False, None),
    "bnb_4bit_quant_type": ("nf4",),
    "strict": (False, None),
    "bf16": ("auto", True, None),
    "fp16": (False, None),
    "tf32": (False, None),
    "train_on_inputs": (False, None),
    "group_by_length": (False, None),
    "pad_to_sequence_len": (True, False, None),  # rows are never padded
    "eval_sample_packing": (True, False, None),  # documents never see each other
    "flash_attention": (True, False, None),  # chooses a kernel, not a result
    "attn_implementation": (
        *("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
        None,
    ),
    "sdp_attention": (True, False, None),
    "xformers_attention": (True, False, None),
    "attention": ("flash", None),
    "logging_steps": tuple(range(10_001)),  # every step is logged
    "chat_template": ("tokenizer_default", None),
    "model_type": ("AutoModelForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", None),
    "tokenizer_type": ("AutoTokenizer", "LlamaTokenizer", "LlamaTokenizerFast", None),  # the base's
    "is_llama_derived_model": (True, False, None),  # the base says what it is
    "is_mistral_derived_model": (True, False, None),
    "trust_remote_code": (False, None),
    "lora_fan_in_fan_out": (False, None),
    "use_wandb": (False, None),
    "do_causal_lm_eval": (False, None),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False}, {"use_reentrant": True}, None),
}


def is_axolotl(table: Mapping[str, Any]) -> bool:
    return "base_model" in table


def translate(table: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(our settings, keys that cannot be honoured). Raises ConfigError for a bad value."""
    ours: dict[str, Any] = {}
    unknown: list[str] = []
    if table.get("adapter") is None:
        unknown.append(
            "a missing `adapter` (Axolotl then trains all weights; write `adapter: qlora`)"
        )
    _check_distinct(table)
    for key, value in table.items():
        if key in _SPECIAL:
            _SPECIAL[key](value, ours, unknown)
        elif key in _RENAMED:
            if value is not None:
                ours[_RENAMED[key]] = value
        elif key in _DONE_ANYWAY:
            if value not in _DONE_ANYWAY[key]:
                unknown.append(f"{key}: {value}")
        elif value not in (None, "", [], {}):
            unknown.append(key)
    if "out" in ours and "name" not in ours:
        ours["name"] = _name_of(str(ours["out"]))
    return ours, unknown


def _check_distinct(table: Mapping[str, Any]) -> None:
    """Two keys for one setting of ours, such as warmup_steps and warmup_ratio."""
    given: dict[str, str] = {}
    for key, ours in _RENAMED.items():
        if table.get(key) is not None and given.setdefault(ours, key) != key:
            raise ConfigError(f"{given[ours]} and {key} exclude each other.")


def _name_of(out: str) -> str:
    """An adapter name from `output_dir`, which is all that Axolotl has."""
    last = out.rstrip("/").rpartition("/")[2].lower()
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in last).strip("._-")


def _datasets(value: Any, ours: dict[str, Any], unknown: list[str]) -> None:
    _one_dataset(value, "datasets", "data", ours, unknown)


def _test_datasets(value: Any, ours: dict[str, Any], unknown: list[str]) -> None:
    _one_dataset(value, "test_datasets", "eval_data", ours, unknown)


def _one_dataset(
    value: Any, key: str, target: str, ours: dict[str, Any], unknown: list[str]
) -> None:
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
        raise ConfigError(f"{key} must be a list of one data set.")
    entry = dict(value[0])
    files = entry.pop("data_files", None)
    path = entry.pop("path", None)
    ours[target] = files[0] if isinstance(files, list) and files else files or path
    kind = entry.pop("type", None)
    if kind not in _DATA_TYPES:
        unknown.append(f"{key}.type: {kind}")
    columns = _columns(entry, is_text=kind == "completion")
    if columns and ours.setdefault("columns", columns) != columns:
        raise ConfigError(f"{key} must have the columns of the other data set.")
    allowed = {"ds_type": ("json", "csv", None), "split": ("train", "test", None)}
    unknown += [f"{key}.{k}" for k, v in entry.items() if v not in allowed.get(k, (None,))]


def _columns(entry: dict[str, Any], *, is_text: bool) -> str:
    """Our `columns`; takes their keys out of `entry`."""
    keys = {"field_messages": "messages", "field": "text"}
    named = {ours: entry.pop(key) for key, ours in keys.items() if key in entry}
    named = {ours: column for ours, column in named.items() if column not in (None, ours)}
    if is_text:
        named.setdefault("text", "text")
    return ",".join(f"{ours}={column}" for ours, column in named.items())


def _targets(value: Any, ours: dict[str, Any], unknown: list[str]) -> None:
    if value:
        ours["target_modules"] = value


def _all_linear(value: Any, ours: dict[str, Any], unknown: list[str]) -> None:
    if value:
        ours["target_modules"] = "all-linear"


def _optimizer(value: Any, ours: dict[str, Any], unknown: list[str]) -> None:
    if value in _OPTIMIZERS:
        ours["optimizer"] = _OPTIMIZERS[value]
    elif value is not None:
        unknown.append(f"optimizer: {value}")


def _scheduler(value: Any, ours: dict[str, Any], unknown: list[str]) -> None:
    if value in ("cosine", "linear", "constant", "constant_with_warmup"):
        ours["schedule"] = str(value).partition("_")[0]
    elif value is not None:
        unknown.append(f"lr_scheduler: {value}")


def _held_out(value: Any, ours: dict[str, Any], unknown: list[str]) -> None:
    """A share of the data; Axolotl also takes a number of rows, which is refused."""
    if isinstance(value, int | float) and value >= 1:
        unknown.append(f"val_set_size: {value}")
    elif value:
        ours["eval_split"] = value


def _prepared_path(value: Any, ours: dict[str, Any], unknown: list[str]) -> None:
    """Where Axolotl keeps tokenised data; there is nothing to keep here."""


def _length_of_tables(value: Any, ours: dict[str, Any], unknown: list[str]) -> None:
    """Of the answers in tables that `eval_table_size` or `do_causal_lm_eval` ask for; who asks for
    them is refused by these."""


def _special_tokens(value: Any, ours: dict[str, Any], unknown: list[str]) -> None:
    """A padding token is never needed; others would change the base's tokenizer."""
    names = value if isinstance(value, dict) else {}
    unknown += [
        f"special_tokens.{name}" for name, token in names.items() if token and name != "pad_token"
    ]


def _checkpointing(value: Any, ours: dict[str, Any], unknown: list[str]) -> None:
    ours["gradient_checkpointing"] = value in (True, "true")
    if value not in (True, False, None, "true", "false"):
        unknown.append(f"gradient_checkpointing: {value}")


_SPECIAL: Mapping[str, Callable[[Any, dict[str, Any], list[str]], None]] = {
    "datasets": _datasets,
    "test_datasets": _test_datasets,
    "lora_target_modules": _targets,
    "lora_target_linear": _all_linear,
    "optimizer": _optimizer,
    "lr_scheduler": _scheduler,
    "val_set_size": _held_out,
    "dataset_prepared_path": _prepared_path,
    "eval_max_new_tokens": _length_of_tables,
    "eval_table_max_new_tokens": _length_of_tables,
    "special_tokens": _special_tokens,
    "gradient_checkpointing": _checkpointing,
}
