"""What a run would do, before anything is loaded: tokens, steps, trainable share, memory.

The memory is an estimate from sizes (`memory.py`), not a measurement. Loads no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from loriner.model.config import ModelConfig
from loriner.model.weights import Checkpoint
from loriner.train.answers import MAX_ROWS
from loriner.train.attention import Groups
from loriner.train.base import device_of, dtype_of
from loriner.train.job import eval_tokens, make_feed, num_steps
from loriner.train.masks import Document
from loriner.train.memory import PROCESS, Adapter, Memory, PassSize
from loriner.train.optim import num_warmup
from loriner.train.padding import padding
from loriner.train.passes import chunks, lengths_of
from loriner.train.prepare import Preparation, Prepared
from loriner.train.recording import spread

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class JobPlan:
    """One job in numbers."""

    name: str
    num_steps: int
    num_warmup: int
    tokens_a_step: float  # on average
    learnt_a_step: float
    largest_pass: tuple[Document, ...]
    adapter: Adapter

    @property
    def num_tokens(self) -> int:
        """Of the largest pass."""
        return _num_tokens(self.largest_pass)


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole run in numbers. Sizes are bytes, and of the GPU where there is one, as
    `torch.cuda.max_memory_allocated` has them: without CUDA's own; else of the whole process."""

    jobs: tuple[JobPlan, ...]
    device: str
    dtype: str
    base_parameters: int
    base_bytes: int
    work_bytes: int  # of passes and answers, at most
    graph_bytes: int  # more, for passes as CUDA graphs; they do without where it is not there

    @property
    def state_bytes(self) -> int:
        return sum(job.adapter.state_bytes(self.device == "cuda") for job in self.jobs)

    @property
    def paged_bytes(self) -> int:
        """Of states that lie in the GPU's memory or the host's."""
        return sum(j.adapter.paged_bytes for j in self.jobs) if self.device == "cuda" else 0

    @property
    def process_bytes(self) -> int:
        return PROCESS if self.device == "cpu" else 0

    @property
    def memory_bytes(self) -> int:
        return self.process_bytes + self.base_bytes + self.state_bytes + self.work_bytes

    def lines(self) -> list[str]:
        parts = [
            ("the process itself", self.process_bytes),
            ("base", self.base_bytes),
            ("adapters and optimisers", self.state_bytes),
            ("passes", self.work_bytes),
        ]
        told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size)
        more = [
            (self.paged_bytes, "of optimiser states that give way to the host's memory"),
            (self.graph_bytes, "for passes as CUDA graphs, where it is free"),
        ]
        beside = "".join(f"; {size / GIB:.2f} more {why}" for size, why in more if size)
        return [
            *(line for job in self.jobs for line in self._job_lines(job)),
            f"memory: about {self.memory_bytes / GIB:.2f} GiB on {self.device} in {self.dtype}: "
            f"{told}{beside}",
        ]

    def _job_lines(self, job: JobPlan) -> list[str]:
        trained = job.adapter.num_parameters
        share = trained / self.base_parameters
        return [
            f"{job.name}: {job.num_steps} steps ({job.num_warmup} of warm-up), "
            f"{job.num_steps * job.tokens_a_step:.0f} tokens, "
            f"{job.num_steps * job.learnt_a_step:.0f} of them learnt; "
            f"{job.tokens_a_step:.0f} a step, {job.num_tokens} in the largest pass",
            f"  trainable: {trained} of {self.base_parameters} parameters ({share:.2%})",
        ]


def make_plan(preparation: Preparation) -> Plan:
    run = preparation.settings.run
    device = device_of(run)
    dtype = dtype_of(run, device)
    config = preparation.config
    jobs = tuple(_plan_job(part, config) for part in preparation.jobs)
    on_gpu = device.type == "cuda"
    adapters = [job.adapter for job in jobs]
    memory = Memory(config, adapters, dtype, run.gradient_checkpointing, on_gpu)
    is_padded = on_gpu and dtype != torch.float32
    learning = memory.learning(pass_size([job.largest_pass for job in jobs], device, is_padded))
    beside = [_beside(memory, part) for part in preparation.jobs]
    return Plan(
        jobs=jobs,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        base_parameters=config.num_parameters,
        base_bytes=_base_bytes(Checkpoint.open(run.base), dtype),
        work_bytes=max(learning, *beside),
        graph_bytes=learning if is_padded else 0,
    )


def pass_size(
    parts: Sequence[Sequence[Document]], device: torch.device, is_padded: bool
) -> PassSize:
    """Of the documents of each job; `is_padded`: to a size that CUDA graphs have."""
    if is_padded:
        _, sizes = padding(parts)
        return PassSize(sizes.tokens, sizes.num_learnt)
    documents = [document for part in parts for document in part]
    groups = Groups.of(lengths_of(documents), torch.device(device.type))
    return PassSize(
        tuple(map(_num_tokens, parts)),
        sum(document.num_learnt for document in documents),
        0 if groups.length else len(groups.rows),
    )


def _beside(memory: Memory, part: Prepared) -> int:
    """What a job's evaluations and answers take, at most."""
    job, most = part.settings, 0
    if part.held is not None:
        documents = part.held.documents
        for start, end in chunks(lengths_of(documents), eval_tokens(job)):
            learnt = sum(document.num_learnt for document in documents[start:end])
            most = max(most, memory.evaluating(_num_tokens(documents[start:end]), learnt))
    data = part.held or part.data
    is_gated = part.held is not None and job.gate != "loss"
    rows = min(MAX_ROWS, max(2 * job.samples, job.canaries, MAX_ROWS * is_gated))
    if not rows:
        return most
    lengths = {e.prompt: sum(lengths_of(e.documents)) for e in data.entries}
    length = max(lengths[prompt] for prompt in spread(data.prompts, rows))
    return max(most, memory.answering(rows, length + job.sample_tokens))


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
        largest_pass=tuple(max(passes, key=_num_tokens)),
        adapter=Adapter(
            job.rank,
            len(job.targets()),
            num_parameters,
            job.optimizer,
            keeps_best=job.keep_best and part.held is not None,
        ),
    )


def _num_tokens(documents: Iterable[Document]) -> int:
    return sum(len(document.token_ids) for document in documents)


def _base_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """The file's bytes, with its dense tensors in `dtype`."""
    linears = {f"{name}.weight" for name in checkpoint.config.linears()}
    tensors = checkpoint.config.tensors()
    dense = sum(torch.Size(s).numel() for n, s in tensors.items() if n not in linears)
    return checkpoint.num_bytes + dense * (dtype.itemsize - 2)
