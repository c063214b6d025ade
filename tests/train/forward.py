"""The trainer's forward over a prompt, with an adapter from a PEFT folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from loriner.train.base import open_base
from loriner.train.lora import Lora, Segment
from loriner.train.settings import RunConfig


def trainer_logits(base: Path, adapter: Path, prompt: list[int], device: str) -> Tensor:
    """[tokens, vocab] f32 on the CPU."""
    trainer = open_base(RunConfig(base=base, device=device))
    config = json.loads((adapter / "adapter_config.json").read_text())
    lora = Lora(
        trainer.config.linears_named(config["target_modules"]),
        rank=config["r"],
        scaling=config["lora_alpha"] / config["r"],
        device=trainer.device,
    )
    lora.load(load_file(adapter / "adapter_model.safetensors", device=device))
    with torch.no_grad():
        hidden = trainer.hidden(
            trainer.embed(torch.tensor(prompt, device=device)),
            torch.arange(len(prompt), device=device),
            trainer.plan([len(prompt)]),
            [Segment(0, len(prompt), lora, lora.cast(trainer.dtype))],
        )
        return (hidden @ trainer.head.dense().T).float().cpu()
