"""Optimisers and learning-rate schedules, by the names of the settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loriner.errors import TrainError
from loriner.train.settings import JobConfig

BETAS = (0.9, 0.999)
EPS = 1e-8


def make_optimizer(job: JobConfig, parameters: Sequence[nn.Parameter]) -> Any:
    """AdamW with states in f32 or in 8 bits (bitsandbytes); paged ones lie in managed memory on a
    GPU, and in plain memory on a CPU, where bitsandbytes says so at the first step.

    bitsandbytes leaves the states of a parameter below 4096 elements in f32. An adapter is one
    parameter, so its small tensors have 8-bit states too, in blocks of their own."""
    options = {"lr": job.learning_rate, "betas": BETAS, "eps": EPS}
    options["weight_decay"] = job.weight_decay
    if job.optimizer == "adamw":
        fused = parameters[0].is_cuda  # one launch for all parameters
        return torch.optim.AdamW(parameters, fused=fused, **options)  # type: ignore[arg-type]
    import bitsandbytes

    optim: Any = bitsandbytes.optim
    kinds = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
        "paged_adamw_32bit": optim.PagedAdamW32bit,
    }
    return kinds[job.optimizer](parameters, **options)


def load_state(optimizer: Any, saved: dict[str, Any]) -> None:
    """`load_state_dict`, and states that can be paged are so again: bitsandbytes leaves them in
    plain memory, still takes them for paged, and then ends the process at the next step."""
    optimizer.load_state_dict(saved)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if getattr(value, "is_paged", False):
                state[name] = optimizer.get_state_buffer(parameter, dtype=value.dtype)
                if parameter.is_cuda:
                    torch.cuda.synchronize()  # the buffer is filled with zeros over there
                state[name].copy_(value)


def learning_rate(job: JobConfig, step: int, num_steps: int) -> float:
    """Of step `step` (from 0): a line up over the warm-up, then the schedule down to zero."""
    rise = num_warmup(job, num_steps)
    if step < rise:
        return job.learning_rate * (step + 1) / rise
    done = (step - rise) / max(1, num_steps - rise)
    if job.schedule == "linear":
        return job.learning_rate * (1 - done)
    if job.schedule == "cosine":
        return job.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return job.learning_rate


def num_warmup(job: JobConfig, num_steps: int) -> int:
    """Steps of warm-up: `warmup` is a share below 1 and a count from 1 on."""
    count = job.warmup * num_steps if job.warmup < 1 else job.warmup
    return min(num_steps, math.ceil(count))


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Shorten the gradient to `max_norm` (0: leave it); its length before, f32, on its device."""
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)


def check_finite(name: str, loss: float, norm: float) -> None:
    """Raises TrainError unless a step of job `name` can be taken with this loss and gradient."""
    if not math.isfinite(loss):
        raise TrainError(f"the loss of {name} is not finite: lower learning_rate.")
    if not math.isfinite(norm):
        raise TrainError(
            f"the gradient of {name} is not finite: lower learning_rate, or raise warmup. The last "
            "checkpoint is whole."
        )
