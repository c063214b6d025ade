"""Rotary scaling as configs write it: `rope_scaling` and `rope_theta`, or `rope_parameters`.

Knows no tensors; `rope.py` makes the tables. Invariant: an option that `rope.py` does not compute
is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loriner.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched; fields that a kind does not use keep their defaults.

    `attention_factor` (yarn) multiplies cos and sin; None: 0.1 ln(factor) + 1 (arXiv 2309.00071).
    """

    kind: str = "default"  # default | linear | dynamic | llama3 | yarn
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0


def read_rope(config: Mapping[str, Any], positions: int) -> tuple[float, RopeScaling]:
    """theta and scaling from `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    values = {**old, **new}
    if nested := [key for key, value in values.items() if isinstance(value, Mapping)]:
        raise CheckpointError(f"rope_parameters per layer type ({nested[0]}) are not supported.")
    theta = values.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    named = [values.pop(key, None) for key in ("rope_type", "type")]
    kind = next((name for name in named if name), "default")
    if original := config.get("original_max_position_embeddings"):
        values["original_max_position_embeddings"] = original
    if values.pop("partial_rotary_factor", 1) != 1:
        raise CheckpointError("option partial_rotary_factor is not supported.")
    if values.pop("truncate", True) is not True:
        raise CheckpointError("option rope_parameters.truncate = False is not supported.")
    return float(theta), _scaling(str(kind), values, positions)


_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow"),
}


def _scaling(kind: str, values: dict[str, Any], positions: int) -> RopeScaling:
    if kind not in _ROPE_KEYS:
        known = ", ".join(_ROPE_KEYS)
        raise CheckpointError(f"rope type {kind!r} is not supported; supported are {known}.")
    given = {key: value for key, value in values.items() if value is not None}
    original = given.pop("original_max_position_embeddings", None)
    if kind in ("llama3", "yarn"):
        original = original or positions
    if kind == "yarn":
        given.setdefault("factor", positions / (original or positions))
        _fold_mscale(given)
    if unknown := sorted(set(given) - set(_ROPE_KEYS[kind])):
        raise CheckpointError(f"rope option {', '.join(unknown)} of {kind!r} is not supported.")
    if kind != "default" and "factor" not in given:
        raise CheckpointError(f"rope type {kind!r} needs a factor.")
    numbers = {key: positive(f"rope {key}", value) for key, value in given.items()}
    return RopeScaling(kind, original_max_position_embeddings=original, **numbers)


def _fold_mscale(given: dict[str, Any]) -> None:
    """DeepSeek's mscale / mscale_all_dim give the attention factor; one alone has no effect."""
    mscale, all_dim = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if mscale and all_dim and "attention_factor" not in given:
        log = math.log(max(given["factor"], 1.0))
        given["attention_factor"] = (0.1 * mscale * log + 1.0) / (0.1 * all_dim * log + 1.0)


def positive(name: str, value: object) -> float:
    """`value` as a float. Raises CheckpointError naming it unless it is a number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"{name} {value!r} is not a positive number.")
    return float(value)
