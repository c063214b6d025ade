"""PEFT and transformers' Trainer as one case of `bench train`, used as their guides show.

A script (`python peer_trainer.py JOB OUT`) that imports nothing of ours. The base is bitsandbytes'
Linear4bit with random NF4 codes and double quantisation, made in place.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

WARM_UP = 2  # steps
bnb: Any = bitsandbytes
prepare: Any = peft.prepare_model_for_kbit_training
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Clock(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Seconds and loss of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self._start)

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if "loss" in more["logs"]:
            self.losses.append(float(more["logs"]["loss"]))


def make_model(job: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    raw = {k: v for k, v in job["config"].items() if k != "architectures"}
    config: Any = AutoConfig.for_model(raw.pop("model_type"), **raw)
    config.use_cache = False
    make: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model: Any = make(config, dtype=dtype, attn_implementation="sdpa")
    for name, linear in list(model.named_modules()):
        if name.rpartition(".")[2] in TARGETS:
            n, k = linear.out_features, linear.in_features
            model.set_submodule(name, quantized(n, k, device, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            module, _, last = name.rpartition(".")
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            value = value.fill_(1.0) if value.dim() == 1 else value.normal_(0, 0.02)
            setattr(model.get_submodule(module), last, torch.nn.Parameter(value))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.is_loaded_in_4bit = True
    return model


def quantized(n: int, k: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Linear4bit [n, k] with random codes, and scales as double quantisation stores them."""
    make = bnb.functional.QuantState
    blocks = n * k // 64
    nested = make(
        absmax=torch.full((-(-blocks // 256),), 0.5 / k**0.5, device=device),
        code=bnb.functional.create_dynamic_map().to(device),
        blocksize=256,
        dtype=torch.float32,
    )
    state = make(
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        shape=torch.Size((n, k)),
        code=bnb.functional.get_4bit_type("nf4", device=device),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.tensor(1.9 / k**0.5, device=device),
        state2=nested,
    )
    with torch.device("meta"):
        linear = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type="nf4")
    codes = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device=device)
    linear.weight = bnb.nn.Params4bit(
        codes, requires_grad=False, quant_state=state, bnb_quantized=True, module=linear
    )
    linear.quant_state = state
    return linear


def arguments(job: dict[str, Any], folder: str) -> TrainingArguments:
    on_gpu = job["device"] == "cuda"
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=job["batch"],
        max_steps=job["steps"] + WARM_UP,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim="paged_adamw_8bit",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=job["checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def main(job: dict[str, Any]) -> dict[str, Any]:
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    on_gpu = job["device"] == "cuda"
    device = torch.device(job["device"])
    torch.manual_seed(job["seed"])
    model = make_model(job, device, torch.bfloat16 if on_gpu else torch.float32)
    model = prepare(
        model,
        use_gradient_checkpointing=job["checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    config = peft.LoraConfig(
        r=job["rank"], lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    wrapped: Any = peft.get_peft_model(model, config)
    loaded = torch.cuda.memory_allocated() if on_gpu else peak_memory()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    clock = train(wrapped, job)
    return {
        "jobs": 1,
        "tokens_per_step": job["batch"] * job["length"],
        "step_s": clock.times[WARM_UP:],
        "losses": clock.losses,
        "loaded_bytes": loaded,
        "peak_bytes": peak_memory(),
    }


def train(model: Any, job: dict[str, Any]) -> Clock:
    draw, clock = random.Random(0), Clock()
    vocab, length = job["config"]["vocab_size"], job["length"]
    rows = [[draw.randrange(vocab) for _ in range(length)] for _ in range(64)]
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=model,
            args=arguments(job, folder),
            train_dataset=data,
            data_collator=collate,
            callbacks=[clock],
        ).train()
    return clock


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}


def peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not getrusage's, which is also the peak of whoever started this process.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    job_file, out_file = map(Path, sys.argv[1:])
    out_file.write_text(json.dumps(main(json.loads(job_file.read_text()))))
