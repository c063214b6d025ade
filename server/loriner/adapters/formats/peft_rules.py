"""Each key of a PEFT config: honoured, harmless at some values, or refused with the reason.

The keys are those of `LoraConfig` in peft 0.21.2 and of versions before it. Knows no tensors and no
base. Invariant: a key that could change the mathematics and is not honoured is refused, known here
or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loriner.adapters.names import show

Rule = Callable[[str, Any], str | None]

_CONVERT = (
    "changes the base's weights in training; save it again as plain LoRA, with "
    "save_pretrained(path_initial_model_for_weight_conversion=...)"
)


def refusal(key: str, value: object) -> str | None:
    """Why this key must be refused whatever the tensors are, or None."""
    rule = _RULES.get(key)
    if rule is not None:
        return rule(key, value)
    if _is_empty(value):
        return None
    return (
        f"the config key `{show(key)}` is unknown and set to {_short(value)}: it might change "
        "what the adapter computes"
    )


def _honoured(key: str, value: object) -> None:
    return None


def _unserved(what: str) -> Rule:
    def rule(key: str, value: object) -> str | None:
        return None if _is_empty(value) else f"{key}: {what} is not served"

    return rule


def _only(*allowed: object) -> Rule:
    def rule(key: str, value: object) -> str | None:
        if any(type(value) is type(a) and value == a for a in allowed):
            return None
        return f"{key} is {_short(value)}: only {_short(allowed[0])} is served"

    return rule


def _of_type(*types: type) -> Rule:
    """Harmless at inference, whatever its value, as long as it has one of these types."""

    def rule(key: str, value: object) -> str | None:
        return None if value is None or type(value) in types else f"{key} is {_short(value)}"

    return rule


def _init(key: str, value: object) -> str | None:
    """Initialisations; the refused ones subtract the initial product from the base (layer.py)."""
    if value is None or isinstance(value, bool):
        return None
    name = value.lower() if isinstance(value, str) else ""
    if name in ("gaussian", "eva", "orthogonal", "mica"):
        return None
    if name in ("olora", "loftq", "lora_ga") or name.startswith(("pissa", "corda")):
        return f"{key} is {_short(value)}: this initialisation {_CONVERT}"
    return f"{key} is {_short(value)}: this initialisation is unknown"


def _auto_mapping(key: str, value: object) -> str | None:
    """PEFT writes the model's class when no task type was given; it is never imported here."""
    if value is None:
        return None
    fits = isinstance(value, dict) and set(value) <= {
        "base_model_class",
        "parent_library",
        "unsloth_fixed",
    }
    if fits and str(value.get("base_model_class")).endswith("ForCausalLM"):  # type: ignore[attr-defined]
        return None
    return f"{key} is {_short(value)}: only causal language models are served"


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "r",
            "lora_alpha",
            "use_rslora",
            "lora_bias",
            "ensure_weight_tying",
            "rank_pattern",
            "alpha_pattern",
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "loriner_base_digest",
        ),
        _honoured,
    ),
    "peft_type": _only("LORA"),
    "task_type": _only("CAUSAL_LM", None),
    "bias": _only("none", None),
    "fan_in_fan_out": _only(False, None),
    "init_lora_weights": _init,
    "auto_mapping": _auto_mapping,
    "use_dora": _unserved("DoRA"),
    "modules_to_save": _unserved("replacing whole modules"),
    "alora_invocation_tokens": _unserved("aLoRA (activated LoRA)"),
    "target_parameters": _unserved("LoRA on bare parameters (MoE experts)"),
    "layer_replication": _unserved("layer replication"),
    "trainable_token_indices": _unserved("training single tokens"),
    "use_qalora": _unserved("QALoRA"),
    "use_bdlora": _unserved("BD-LoRA"),
    "kasa_config": _unserved("KaSA"),
    "velora_config": _unserved("VeLoRA"),
    "monteclora_config": _unserved("MonteCLoRA"),
    "arrow_config": _unserved("Arrow routing"),
    "megatron_config": _unserved("Megatron"),
    "loftq_config": _unserved("LoftQ, which replaces the base,"),
    "corda_config": _unserved("CorDA, which changes the base,"),
    "lora_ga_config": _unserved("LoRA-GA, which changes the base,"),
    "eva_config": _of_type(dict),
    "runtime_config": _of_type(dict),
    "base_model_name_or_path": _of_type(str),
    "revision": _of_type(str),
    "peft_version": _of_type(str),
    "megatron_core": _of_type(str),
    "inference_mode": _of_type(bool),
    "lora_dropout": _of_type(int, float),
    "qalora_group_size": _of_type(int),
}


def _is_empty(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def _short(value: object) -> str:
    return f"`{show(str(value), 48)}`"
