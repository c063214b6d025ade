"""What a training run and each of its jobs can be told, and what becomes of its adapters. Flags,
LORINER_* and files fill the same dataclasses; every field has its help text and limits here.

Lengths are tokens, rates are per optimiser step. Raises ConfigError naming the setting.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from loriner.adapters.names import AdapterName, parse_name
from loriner.config import KEY_ENV, check_choice, check_exclusive, check_limits, setting
from loriner.errors import ConfigError, InvalidRequestError
from loriner.train.canaries import TOLERANCES

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_USUAL = ", ".join(f"{limit:g} for one trained in {dtype}" for dtype, limit in TOLERANCES.items())
TOLERANCE_HELP = f"largest difference of a log-probability, in nats (unset: {_USUAL})"
METRICS = ("loss", "exact", "json", "number")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What all jobs of one run share: the base and the machine."""

    base: Path = setting(Path("models/smollm2-nf4"), "folder of the NF4 base model")
    device: str = setting("auto", "auto, cpu or cuda")
    dtype: str = setting("auto", "of activations: auto, float32 or bfloat16")
    gradient_checkpointing: bool = setting(False, "keep one activation a layer, compute the rest")
    num_threads: int = setting(0, "CPU threads (0: all cores)", low=0)
    memory_fraction: float = setting(1.0, "most of the GPU's memory to take", low=0.01, high=1)
    duty: float = setting(1.0, "share of the time to compute; the rest is idle", low=0.01, high=1)

    def __post_init__(self) -> None:
        check_limits(self)
        check_choice(self, "device", ("auto", "cpu", "cuda"))
        check_choice(self, "dtype", ("auto", "float32", "bfloat16"))


@dataclass(frozen=True, slots=True)
class JobConfig:
    """One adapter: its data, its LoRA, its optimiser and what becomes of it."""

    name: str = setting("", "adapter to make: name or tenant/name")
    data: Path | None = setting(None, "training rows: .jsonl, .json, .csv or .tsv")
    eval_data: Path | None = setting(None, "held-out rows of the same kinds")
    eval_split: float = setting(
        0.0, "share of data to hold out instead", instead_of="eval_data", low=0, high=0.9
    )
    columns: str = setting("", "names of columns, e.g. prompt=question,completion=answer")
    max_bad_share: float = setting(0.01, "most rows that may be bad", low=0, high=1)
    out: Path | None = setting(None, "folder of the run (default: runs/NAME)")

    rank: int = setting(16, "of every LoRA module", low=1, high=256)
    alpha: float = setting(32.0, "scaling is alpha / rank", low=0.001, high=1e6)
    dropout: float = setting(0.0, "on the inputs of A", low=0, high=0.99)
    target_modules: str = setting("all-linear", "all-linear, or names such as q_proj,v_proj")
    rslora: bool = setting(False, "scaling is alpha / sqrt(rank) (arXiv 2312.03732)")

    learning_rate: float = setting(2e-4, "at its highest", low=0, high=10)
    schedule: str = setting("cosine", "after warm-up: constant, linear or cosine")
    warmup: float = setting(0.03, "steps of rising rate: a share below 1, or a count", low=0)
    epochs: float = setting(1.0, "passes over the data, where steps is 0", low=0.001, high=1e4)
    steps: int = setting(0, "optimiser steps (0: from epochs)", low=0)
    batch: int = setting(4, "documents in one pass; with packing, packs of max_length", low=1)
    accumulation: int = setting(1, "passes summed into one optimiser step", low=1)
    max_length: int = setting(
        0, "longest document; more is cut off (0: 1024, or the context)", low=0
    )
    packing: bool = setting(False, "fill passes with as many documents as max_length * batch holds")
    neftune: float = setting(0.0, "alpha of noise on embeddings (arXiv 2310.05914)", low=0)
    weight_decay: float = setting(0.0, "decoupled, as in AdamW", low=0, high=1)
    max_grad_norm: float = setting(1.0, "longer gradients are shortened to it (0: never)", low=0)
    optimizer: str = setting(
        "adamw",
        "adamw, adamw_8bit, paged_adamw_8bit or paged_adamw_32bit; on a GPU states that are paged "
        "give way to the host's memory, on a CPU they are kept as others are",
    )
    seed: int = setting(0, "of all random numbers", low=0, high=2**31 - 1)

    eval_every: int = setting(0, "steps between evaluations (0: ten in a run)", low=0)
    evals_per_epoch: int = setting(
        0, "evaluations in an epoch, instead of eval_every", instead_of="eval_every", low=0
    )
    eval_rows: int = setting(0, "held-out rows that are used (0: all)", low=0)
    save_every: int = setting(0, "steps between checkpoints (0: only the last)", low=0)
    saves_per_epoch: int = setting(
        0, "checkpoints in an epoch, instead of save_every", instead_of="save_every", low=0
    )
    keep_best: bool = setting(True, "the adapter with the lowest eval loss is the result")
    early_stopping: int = setting(0, "stop after so many evaluations without gain (0: no)", low=0)
    samples: int = setting(3, "answers of base and adapter to show", low=0, high=64)
    canaries: int = setting(4, "prompts whose logits are recorded", low=0, high=64)
    sample_tokens: int = setting(48, "longest sample answer", low=1, high=4096)
    gate: str = setting("loss", "what must beat the base: loss, exact, json or number")
    gate_min: float = setting(0.0, "least score of exact, json or number", low=0, high=1)
    gate_rows: int = setting(100, "held-out rows that are answered for the gate", low=1)

    def __post_init__(self) -> None:
        check_limits(self)
        check_choice(self, "schedule", SCHEDULES)
        check_choice(self, "optimizer", OPTIMIZERS)
        check_choice(self, "gate", METRICS)
        if not self.name:
            raise ConfigError("name is missing: which adapter is to be made?")
        try:
            parse_name(self.name)
        except InvalidRequestError as error:
            raise ConfigError(f"name: {error}") from None
        if self.data is None:
            raise ConfigError(f"data is missing for {self.name}.")
        check_exclusive(self)
        if self.early_stopping and not self.has_eval:
            raise ConfigError("early_stopping needs eval_data or eval_split.")
        self.targets()

    @property
    def has_eval(self) -> bool:
        return self.eval_data is not None or self.eval_split > 0

    @property
    def data_path(self) -> Path:
        assert self.data is not None
        return self.data

    @property
    def folder(self) -> Path:
        """Where the run keeps adapter, checkpoints and metrics."""
        return self.out or Path("runs") / self.name.replace("/", "--")

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) (rsLoRA, equation 4)."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    def targets(self) -> tuple[str, ...]:
        """The last names of the adapted modules."""
        if self.target_modules.strip().lower() == "all-linear":
            return ALL_LINEAR
        names = [name for name in re.split(r"[\s,]+", self.target_modules) if name]
        if unknown := [name for name in names if name not in ALL_LINEAR]:
            raise ConfigError(
                f"target_modules: {unknown[0]!r} is not one of all-linear, {', '.join(ALL_LINEAR)}."
            )
        if not names:
            raise ConfigError("target_modules is empty.")
        return tuple(name for name in ALL_LINEAR if name in names)


@dataclass(frozen=True, slots=True)
class PublishConfig:
    """Where all adapters of a run are published; nowhere by default."""

    publish: str = setting("", "URL of a running server to publish into")
    store: Path | None = setting(
        None, "folder of a store to publish into", instead_of="publish", env=()
    )
    key: str = setting("", "admin key of that server", env=KEY_ENV)

    def __post_init__(self) -> None:
        check_exclusive(self)

    @property
    def is_wanted(self) -> bool:
        return bool(self.publish or self.store)


@dataclass(frozen=True, slots=True)
class PromoteConfig:
    """When one adapter is published, and what else is pointed at it."""

    promote: str = setting("", "alias to point at the adapter if the gate passes")
    canary_tolerance: float | None = setting(None, TOLERANCE_HELP, low=0)

    def __post_init__(self) -> None:
        check_limits(self)

    def alias(self, name: str) -> AdapterName | None:
        """`prod` of an adapter is an alias of the same tenant."""
        if not self.promote:
            return None
        tenant = parse_name(name).tenant
        alias = self.promote if "/" in self.promote else f"{tenant}/{self.promote}"
        try:
            return parse_name(alias)
        except InvalidRequestError as error:
            raise ConfigError(f"promote: {error}") from None
