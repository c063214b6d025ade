"""What a run would do, before anything is loaded: tokens, steps, trainable share, memory.

The memory is an estimate from sizes, not a measurement; activations are counted as the layers
keep them. Knows shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loriner.model.config import ModelConfig
from loriner.model.weights import Checkpoint
from loriner.train.base import device_of, dtype_of
from loriner.train.job import make_feed, num_steps
from loriner.train.loss import PIECE
from loriner.train.optim import num_warmup
from loriner.train.prepare import Preparation, Prepared

STATE_BYTES = {
    "adamw": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8,
}  # of the optimiser, a parameter
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class JobPlan:
    """One job in numbers."""

    name: str
    num_steps: int
    num_warmup: int
    tokens_a_step: float  # on average
    learnt_a_step: float
    largest_pass: int  # tokens
    num_parameters: int
    state_bytes: int  # weights, gradients, optimiser


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole run in numbers. Sizes are bytes."""

    jobs: tuple[JobPlan, ...]
    device: str
    dtype: str
    base_parameters: int
    base_bytes: int
    activation_bytes: int

    @property
    def memory_bytes(self) -> int:
        return self.base_bytes + self.activation_bytes + sum(j.state_bytes for j in self.jobs)

    def lines(self) -> list[str]:
        states = sum(job.state_bytes for job in self.jobs)
        return [
            *(line for job in self.jobs for line in self._job_lines(job)),
            f"memory: about {self.memory_bytes / GIB:.2f} GiB on {self.device} in {self.dtype}: "
            f"base {self.base_bytes / GIB:.2f}, adapters and optimisers {states / GIB:.2f}, "
            f"activations {self.activation_bytes / GIB:.2f}",
        ]

    def _job_lines(self, job: JobPlan) -> list[str]:
        share = job.num_parameters / self.base_parameters
        return [
            f"{job.name}: {job.num_steps} steps ({job.num_warmup} of warm-up), "
            f"{job.num_steps * job.tokens_a_step:.0f} tokens, "
            f"{job.num_steps * job.learnt_a_step:.0f} of them learnt; "
            f"{job.tokens_a_step:.0f} a step, {job.largest_pass} in the largest pass",
            f"  trainable: {job.num_parameters} of {self.base_parameters} parameters ({share:.2%})",
        ]


def make_plan(preparation: Preparation) -> Plan:
    run = preparation.settings.run
    device = device_of(run)
    dtype = dtype_of(run, device)
    config = preparation.config
    jobs = tuple(_plan_job(part, config) for part in preparation.jobs)
    num_tokens = sum(job.largest_pass for job in jobs)
    return Plan(
        jobs=jobs,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        base_parameters=config.num_parameters,
        base_bytes=_base_bytes(Checkpoint.open(run.base), dtype),
        activation_bytes=activation_bytes(
            config, num_tokens, dtype, checkpointing=run.gradient_checkpointing
        ),
    )


def activation_bytes(
    config: ModelConfig, num_tokens: int, dtype: torch.dtype, *, checkpointing: bool
) -> int:
    """What the backward needs: per token and layer about 12 states of H, 5 of the MLP's width and
    attention's q, k, v and output; with checkpointing one state of H, and one layer in full."""
    attention = (config.num_heads * 2 + config.num_kv_heads * 2) * config.head_dim
    layer = 12 * config.hidden_size + 5 * config.intermediate_size + 2 * attention
    kept = config.num_layers * layer
    if checkpointing:
        kept = config.num_layers * config.hidden_size + layer
    widest = max(n * k for n, k in config.linears().values())
    return num_tokens * kept * dtype.itemsize + widest * dtype.itemsize + PIECE * 8


def _plan_job(part: Prepared, config: ModelConfig) -> JobPlan:
    job, feed = part.settings, make_feed(part.settings, part.data)
    steps = num_steps(job, feed)
    passes = [p for step in range(feed.steps_per_epoch) for p in feed.passes(step)]
    shapes = config.linears_named(job.targets()).values()
    num_parameters = sum(job.rank * (n + k) for n, k in shapes)
    return JobPlan(
        name=job.name,
        num_steps=steps,
        num_warmup=num_warmup(job, steps),
        tokens_a_step=part.data.num_tokens / feed.steps_per_epoch,
        learnt_a_step=part.data.num_learnt / feed.steps_per_epoch,
        largest_pass=max(sum(len(d.token_ids) for d in documents) for documents in passes),
        num_parameters=num_parameters,
        state_bytes=num_parameters * (4 + 4 + STATE_BYTES[job.optimizer]),
    )


def _base_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """The file's bytes, with its dense tensors in `dtype`."""
    linears = {f"{name}.weight" for name in checkpoint.config.linears()}
    tensors = checkpoint.config.tensors()
    dense = sum(torch.Size(s).numel() for n, s in tensors.items() if n not in linears)
    return checkpoint.num_bytes + dense * (dtype.itemsize - 2)
