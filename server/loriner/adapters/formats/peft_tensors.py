"""The tensors of a PEFT file, sorted by module and compared with config and base.

Knows names and shapes, reads no weights. Invariant: `faults` is empty only when every tensor has
its place, every place that the config names has its tensors, and each shape is what rank and base
ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from loriner.adapters.adapter import EMBEDDING
from loriner.adapters.formats import Modules
from loriner.adapters.formats.peft_config import PeftConfig
from loriner.adapters.formats.peft_targets import LM_HEAD
from loriner.adapters.header import TensorInfo, listing

PREFIX = "base_model.model."
BASE_COPY = ".base_layer.weight"

_LINEAR_ROLES = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_B.bias": "bias"}
_EMBEDDING_ROLES = {".lora_embedding_A": "a", ".lora_embedding_B": "b"}
_SPELLING = {"a": "lora_A", "b": "lora_B", "bias": "lora_B.bias"}

# What a stranger's name gives away, for a better reason than that no module takes it.
_KNOWN_STRANGERS = {
    "lora_magnitude_vector": "for DoRA, which is not served",
    "modules_to_save": "to replace whole modules, which is not served",
    "token_adapter": "to train single tokens, which is not served",
    "lora_diag": "for KaSA, which is not served",
    ".experts.": "for MoE experts, which are not served",
}


@dataclass(frozen=True, slots=True)
class Parts:
    """Tensor names by what they are for."""

    modules: dict[str, dict[str, str]] = field(default_factory=dict)  # module -> role -> tensor
    base_copies: dict[str, str] = field(default_factory=dict)  # "lm_head.weight" -> tensor
    strangers: list[str] = field(default_factory=list)


def sort_tensors(names: Mapping[str, TensorInfo], base: Modules) -> Parts:
    """Give each tensor its place in `base`, or set it aside."""
    parts = Parts()
    for name in names:
        module, role = _place(name, base)
        if role == BASE_COPY:
            parts.base_copies[f"{module}.weight"] = name
        elif role:
            parts.modules.setdefault(module, {})[role] = name
        else:
            parts.strangers.append(name)
    return parts


def is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] == EMBEDDING


def faults(
    parts: Parts, tensors: Mapping[str, TensorInfo], base: Modules, config: PeftConfig | None
) -> Iterator[str]:
    """Everything that is wrong. Without a usable config, what can be said of the tensors alone."""
    yield from _strangers(parts)
    yield from _pairs(parts)
    if config is not None:
        yield from _presence(parts, base, config)
        yield from _biases(parts, config)
        yield from _ties(parts, config)
    yield from _shapes(parts, tensors, base, config)


def _place(name: str, base: Modules) -> tuple[str, str]:
    """(module, role) of a tensor, or two empty strings."""
    if not name.startswith(PREFIX):
        return "", ""
    rest = name.removeprefix(PREFIX)
    if rest.endswith(BASE_COPY) and rest.removesuffix(BASE_COPY) in base:
        return rest.removesuffix(BASE_COPY), BASE_COPY
    for ending, role in {**_LINEAR_ROLES, **_EMBEDDING_ROLES}.items():
        module = rest.removesuffix(ending)
        if (
            module != rest
            and module in base
            and is_embedding(module) == (ending in _EMBEDDING_ROLES)
        ):
            return module, role
    return "", ""


def _strangers(parts: Parts) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for name in parts.strangers:
        found = (why for mark, why in _KNOWN_STRANGERS.items() if mark in name)
        groups.setdefault(next(found, "that no module of this base takes"), []).append(name)
    for why, names in groups.items():
        yield f"{_count(names, 'tensor')} {why}: {listing(names)}"


def _pairs(parts: Parts) -> Iterator[str]:
    for role in ("a", "b"):
        if lone := [module for module, roles in parts.modules.items() if role not in roles]:
            yield f"{_count(lone, 'module')} without {_SPELLING[role]}: {listing(lone)}"


def _presence(parts: Parts, base: Modules, config: PeftConfig) -> Iterator[str]:
    named = [module for module in base if config.targets.names(module)]
    if not named:
        yield "target_modules names no module of this base"
    if unknown := config.targets.unmatched(base):
        yield f"the config names what this base does not have: {listing(unknown)}"
    if empty := [module for module in named if module not in parts.modules]:
        yield f"{_count(empty, 'module')} that the config names without tensors: {listing(empty)}"
    if extra := sorted(set(parts.modules) - set(named)):
        yield f"{_count(extra, 'module')} that the config does not name: {listing(extra)}"


def _biases(parts: Parts, config: PeftConfig) -> Iterator[str]:
    if config.lora_bias:
        if bare := [module for module, roles in parts.modules.items() if "bias" not in roles]:
            yield f"lora_bias is set, but {_count(bare, 'module')} without a bias: {listing(bare)}"
    elif extra := [module for module, roles in parts.modules.items() if "bias" in roles]:
        yield f"lora_bias is not set, but {_count(extra, 'module')} with a bias: {listing(extra)}"


def _ties(parts: Parts, config: PeftConfig) -> Iterator[str]:
    ends = [m for m in parts.modules if m.rpartition(".")[2] in (EMBEDDING, LM_HEAD)]
    if config.ties_weights and ends:
        yield f"ensure_weight_tying with LoRA on {listing(ends)} is not served"


def _shapes(
    parts: Parts, tensors: Mapping[str, TensorInfo], base: Modules, config: PeftConfig | None
) -> Iterator[str]:
    foreign: list[str] = []
    wrong_rank: list[str] = []
    for module, roles in parts.modules.items():
        num_out, num_in = reversed(base[module]) if is_embedding(module) else base[module]
        shapes = {role: tensors[name].shape for role, name in roles.items()}
        rank = config.rank_of(module) if config else _rank(shapes)
        wanted = {"a": (rank, num_in), "b": (num_out, rank), "bias": (num_out,)}
        for role, shape in shapes.items():
            if shape == wanted[role]:
                continue
            text = f"{module}.{_SPELLING[role]} is {[*shape]}, not {[*wanted[role]]}"
            (wrong_rank if _differs_in_rank(role, shape, wanted[role]) else foreign).append(text)
    if foreign:
        yield (
            f"it was made for another base: {_count(foreign, 'tensor')} with a shape that does "
            f"not fit this one: {listing(foreign)}"
        )
    if wrong_rank:
        count = _count(wrong_rank, "tensor")
        yield f"{count} with another rank than the config says: {listing(wrong_rank)}"


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return shapes["a"][0] if "a" in shapes else shapes.get("b", (1,))[-1]


def _differs_in_rank(role: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether only the rank is wrong, so that the base is not to blame."""
    if len(shape) != len(wanted) or role == "bias":
        return False
    fixed = 1 if role == "a" else 0
    return shape[fixed] == wanted[fixed]


def _count(items: list[str], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"
