"""PEFT LoRA folders: adapter_config.json and adapter_model.safetensors, read without PEFT.

PEFT itself may rewrite the base while it loads a folder, so it never sees one. Knows the base by
its module table only. Invariant: each tensor in the file is one that the config asks for and the
base has a place for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loriner.adapters.adapter import Adapter, LoraWeight
from loriner.adapters.formats import BaseTensor, Modules
from loriner.adapters.formats.peft_config import PeftConfig, parse_config
from loriner.adapters.formats.peft_tensors import Parts, faults, sort_tensors
from loriner.adapters.header import TensorInfo, listing, read_header
from loriner.adapters.names import is_digest
from loriner.adapters.strict_json import parse_object
from loriner.errors import InvalidAdapterError

T = TypeVar("T")

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
NOTE_NAME = "loriner.json"  # written by our trainer: {"base_digest": ...}
MAX_CONFIG_BYTES = 256 << 10
MAX_NOTE_BYTES = 1 << 20
MAX_REASONS = 64
MAX_WEIGHT = 65504.0  # the largest fp16: with scaling folded in, a weight fits every backend


def matches(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file()


def load(
    folder: Path,
    modules: Modules,
    *,
    base_digest: str | None = None,
    base_tensor: BaseTensor | None = None,
) -> Adapter:
    """The adapter in `folder`; its tensors are copies in memory. See `formats.load`."""
    reasons: list[str] = []
    config = _attempt(reasons, lambda: _read_config(folder, reasons))
    named = _attempt(reasons, lambda: _named_base(folder, config, base_digest))
    tensors = _attempt(reasons, lambda: _read_header(folder / WEIGHTS_NAME, modules))
    if tensors is None:
        raise _refused(reasons)
    parts = sort_tensors(tensors, modules)
    reasons += faults(parts, tensors, modules, config)
    weights = _attempt(reasons, lambda: _read_weights(folder / WEIGHTS_NAME, parts, base_tensor))
    if reasons or config is None or weights is None:
        raise _refused(reasons)
    lora = _assemble(config, parts, weights)
    if unbounded := _unbounded(lora):
        raise _refused(unbounded)
    return Adapter.of(lora, base_digest=named, base_name=config.base_name)


def _refused(reasons: list[str]) -> InvalidAdapterError:
    """Every reason, unless there are so many that they are an attack on the reader."""
    more = len(reasons) - MAX_REASONS
    shown = [*reasons[:MAX_REASONS], f"and {more} reasons more"] if more > 0 else reasons
    return InvalidAdapterError(shown)


def _attempt(reasons: list[str], read: Callable[[], T]) -> T | None:
    """What `read` returns; if it refuses, its reasons join the others."""
    try:
        return read()
    except InvalidAdapterError as error:
        reasons += error.reasons
        return None


def _read_config(folder: Path, reasons: list[str]) -> PeftConfig | None:
    config, found = parse_config(_read_json(folder / CONFIG_NAME, MAX_CONFIG_BYTES))
    reasons += found
    return config


def _read_json(path: Path, max_bytes: int) -> dict[str, object]:
    with path.open("rb") as file:
        return parse_object(file.read(max_bytes + 1), path.name, max_bytes)


def _read_header(path: Path, modules: Modules) -> dict[str, TensorInfo]:
    if not path.is_file():
        raise InvalidAdapterError([f"there is no {WEIGHTS_NAME}"])
    return read_header(path, len(modules))


def _named_base(folder: Path, config: PeftConfig | None, ours: str | None) -> str | None:
    """The digest of the base it says it was trained on; refused if that is not `ours`."""
    names = {config.base_digest} if config else set()
    if (folder / NOTE_NAME).is_file():
        digest = _read_json(folder / NOTE_NAME, MAX_NOTE_BYTES).get("base_digest")
        if digest is not None and not (isinstance(digest, str) and is_digest(digest)):
            raise InvalidAdapterError([f"base_digest in {NOTE_NAME} must be 64 hex digits"])
        names.add(digest)
    names.discard(None)
    if len(names) > 1:
        raise InvalidAdapterError([f"{CONFIG_NAME} and {NOTE_NAME} name different bases"])
    named = next(iter(names), None)
    if named and ours and named != ours:
        raise InvalidAdapterError(
            [f"it was trained on another base: it names {named[:12]}, this server has {ours[:12]}"]
        )
    return named


def _read_weights(path: Path, parts: Parts, base_tensor: BaseTensor | None) -> dict[str, Tensor]:
    """Every sorted tensor by its name in the file, owned by us. Refuses NaN and infinity."""
    names = [name for roles in parts.modules.values() for name in roles.values()]
    try:
        with safe_open(path, framework="pt") as file:
            # A clone, because the library's tensor is a view of the file, which may change.
            weights = {name: file.get_tensor(name).clone() for name in names}
            changed = [
                base_name
                for base_name, name in parts.base_copies.items()
                if not _equals_base(file.get_tensor(name), base_name, base_tensor)
            ]
    except SafetensorError as error:
        raise InvalidAdapterError([f"{path.name} cannot be read: {error}"]) from None
    reasons = []
    if bad := [name for name, tensor in weights.items() if not math.isfinite(_largest(tensor))]:
        reasons.append(f"NaN or infinity in {listing(bad)}")
    if changed:
        reasons.append(
            f"copies of base weights that cannot be shown equal to this base: {listing(changed)}; "
            "save with save_pretrained(save_embedding_layers=False)"
        )
    if reasons:
        raise InvalidAdapterError(reasons)
    return weights


def _equals_base(copy: Tensor, name: str, base_tensor: BaseTensor | None) -> bool:
    ours = base_tensor(name) if base_tensor else None
    if ours is None or ours.shape != copy.shape:
        return False
    return torch.equal(copy.to(ours.dtype), ours)


def _largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN if there is one."""
    low, high = torch.aminmax(tensor)
    return max(-low.item(), high.item()) if not low.isnan() else math.nan


def _assemble(
    config: PeftConfig, parts: Parts, weights: Mapping[str, Tensor]
) -> dict[str, LoraWeight]:
    lora = {}
    for module, roles in sorted(parts.modules.items()):
        bias = weights[roles["bias"]] if "bias" in roles else None
        a, b = weights[roles["a"]], weights[roles["b"]]
        lora[module] = LoraWeight(a, b, bias, config.scaling_of(module, a.shape[0]))
    return lora


def _unbounded(lora: Mapping[str, LoraWeight]) -> list[str]:
    bad = [
        f"{module}.{role}"
        for module, weight in lora.items()
        for role, tensor in weight.tensors.items()
        if _largest(tensor) * max(1.0, abs(weight.scaling)) > MAX_WEIGHT
    ]
    return [f"magnitudes over {MAX_WEIGHT:g}, once scaled, in {listing(bad)}"] if bad else []
