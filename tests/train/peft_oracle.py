"""The base as transformers and PEFT compute it, its NF4 linears decoded to fp32 once."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from loriner.kernels.operands import Nf4
from loriner.kernels.reference import dequantized
from loriner.model.weights import Checkpoint
from loriner.train.lora import Lora
from loriner.train.masks import Document


def dense_model(folder: Path) -> Any:
    """AutoModelForCausalLM in fp32 with the values of the NF4 base."""
    raw = json.loads((folder / "config.json").read_text())
    raw = {k: v for k, v in raw.items() if k not in ("quantization_config", "architectures")}
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    checkpoint = Checkpoint.open(folder)
    names = checkpoint.config.tensors()
    state = {name: _value(checkpoint, name) for name in names}
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def _value(checkpoint: Checkpoint, name: str) -> Tensor:
    module = name.removesuffix(".weight")
    weight = checkpoint.linear(module) if name.endswith(".weight") else checkpoint.tensor(name)
    return (dequantized(weight) if isinstance(weight, Nf4) else weight).float()


def with_lora(model: Any, lora: Lora, *, rank: int, alpha: float, **more: Any) -> Any:
    """A PEFT model with the weights of `lora`."""
    from peft import LoraConfig, get_peft_model

    targets = sorted({name.rpartition(".")[2] for name in lora.weights})
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **more)
    with quiet():
        made = get_peft_model(model, config)
    state = {
        name.replace(".weight", ".default.weight"): tensor
        for name, tensor in lora.tensors().items()
    }
    assert not made.load_state_dict(state, strict=False).unexpected_keys
    return made


def peft_gradients(
    folder: Path,
    lora: Lora,
    rows: Sequence[Document],
    *,
    rank: int,
    alpha: float,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[float, dict[str, Tensor]]:
    """The mean loss over the learnt tokens and its gradients by the names of `Lora.tensors`. In
    bf16 with f32 adapters and autocast, as PEFT's users train."""
    peft = with_lora(dense_model(folder).to(device, dtype), lora, rank=rank, alpha=alpha).to(device)
    total, count = 0.0, sum(row.num_learnt for row in rows)
    for row in rows:
        ids = torch.tensor([row.token_ids], device=device)
        labels = ids.masked_fill(~torch.tensor([row.is_learnt], device=device), -100)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = peft(input_ids=ids, labels=labels).loss * row.num_learnt / count
        loss.backward()
        total += loss.item()
    named = dict(peft.named_parameters())
    grads = {
        name: named[name.replace(".weight", ".default.weight")].grad for name in lora.tensors()
    }
    return total, grads


def gradients_of(lora: Lora) -> dict[str, Tensor]:
    """By the names of `Lora.tensors`."""
    grads = (grad for pair in lora.gradients.values() for grad in pair)
    return dict(zip(lora.tensors(), grads, strict=True))


def off(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """||ours - theirs|| / ||theirs|| of each tensor."""
    assert ours.keys() == theirs.keys()
    return {
        name: float((ours[name].float() - tensor).norm() / tensor.norm())
        for name, tensor in theirs.items()
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
