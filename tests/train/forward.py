"""The trainer's forward over prompts, with an adapter from a PEFT folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from loriner.train.base import open_base
from loriner.train.lora import Lora, Segment
from loriner.train.settings import RunConfig


def trainer_logits(
    base: Path, adapter: Path, prompts: Sequence[list[int]], device: str
) -> list[Tensor]:
    """Of each prompt [tokens, vocab] f32 on the CPU."""
    trainer = open_base(RunConfig(base=base, device=device))
    config = json.loads((adapter / "adapter_config.json").read_text())
    lora = Lora(
        trainer.config.linears_named(config["target_modules"]),
        rank=config["r"],
        scaling=config["lora_alpha"] / config["r"],
        device=trainer.device,
    )
    lora.load(load_file(adapter / "adapter_model.safetensors", device=device))
    head, weights = trainer.head.dense().T, lora.cast(trainer.dtype)
    made = []
    with torch.no_grad():
        for prompt in prompts:
            hidden = trainer.hidden(
                trainer.embed(torch.tensor(prompt, device=device)),
                torch.arange(len(prompt), device=device),
                trainer.plan([len(prompt)]),
                [Segment(0, len(prompt), lora, weights)],
            )
            made.append((hidden @ head).float().cpu())
    return made
