"""An adapter folder as PEFT 0.21 writes it, without PEFT; `loriner.json` names the base by digest.

Invariant: what is written opens in PEFT and in `adapters/formats/peft.py` with the same numbers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from loriner.adapters.formats.peft import CONFIG_NAME, NOTE_NAME, WEIGHTS_NAME
from loriner.train.json_file import write_json
from loriner.train.lora import Lora
from loriner.train.settings import JobConfig

__all__ = ["CONFIG_NAME", "NOTE_NAME", "WEIGHTS_NAME", "write_peft_folder"]

PEFT_VERSION = "0.21.2"  # whose keys these are


def write_peft_folder(
    folder: Path, lora: Lora, job: JobConfig, base_digest: str, base_name: str
) -> None:
    """Write config, weights and note into `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in lora.tensors().items()}
    part = folder / f".{WEIGHTS_NAME}.{os.getpid()}"
    save_file(tensors, part, {"format": "pt"})
    part.rename(folder / WEIGHTS_NAME)
    write_json(folder / CONFIG_NAME, peft_config(job, base_name))
    write_json(folder / NOTE_NAME, {"base_digest": base_digest})


def peft_config(job: JobConfig, base_name: str) -> dict[str, Any]:
    """Every key that PEFT 0.21 writes, at its default unless the job says otherwise."""
    nothing = [
        "alora_invocation_tokens",
        "arrow_config",
        "auto_mapping",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "kasa_config",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "lora_ga_config",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "revision",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "velora_config",
    ]
    off = ["ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_dora", "use_qalora"]
    return {
        **dict.fromkeys(nothing),
        **dict.fromkeys(off, False),
        "alpha_pattern": {},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "loftq_config": {},
        "lora_alpha": int(job.alpha) if job.alpha == int(job.alpha) else job.alpha,
        "lora_dropout": job.dropout,
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "qalora_group_size": 16,
        "r": job.rank,
        "rank_pattern": {},
        "target_modules": list(job.targets()),
        "task_type": "CAUSAL_LM",
        "use_rslora": job.rslora,
    }
