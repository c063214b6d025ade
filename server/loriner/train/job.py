"""One adapter in training: its rows, weights, optimiser and history; the loop drives it.

Invariant: everything that the next step depends on is the weights, the optimiser's state, the step
count and the settings, so a checkpoint of these resumes exactly.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from loriner.train.base import Base
from loriner.train.data import DataSet
from loriner.train.feed import Feed
from loriner.train.lora import Lora
from loriner.train.optim import check_finite, clip, learning_rate, make_optimizer
from loriner.train.passes import Share, mean_loss
from loriner.train.settings import JobConfig

EVALS = 10  # in a run, where eval_every is 0


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimiser step; a line of metrics.jsonl."""

    step: int  # from 1
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """Loss on held-out data after `step` steps; step 0 is the base."""

    step: int
    eval_loss: float


class Job:
    """`next_share`, a pass that learns it, `note`, and `advance` once `is_step_complete`."""

    def __init__(
        self, settings: JobConfig, base: Base, data: DataSet, held: DataSet | None
    ) -> None:
        self.settings, self.data, self.held = settings, data, held
        self.lora = Lora(
            base.config.linears_named(settings.targets()),
            rank=settings.rank,
            scaling=settings.scaling,
            dropout=settings.dropout,
            seed=settings.seed,
            device=base.device,
        )
        self.feed = make_feed(settings, data)
        self.num_steps = num_steps(settings, self.feed)
        self.optimizer = make_optimizer(settings, self.lora.parameters())
        self.step = 0  # optimiser steps done
        self.steps: list[StepRecord] = []
        self.evals: list[EvalRecord] = []
        self.best: dict[str, Tensor] | None = None  # weights of the lowest eval loss, on the host
        self.stopped_early = False
        self._passes: list[Share] = []
        self._losses: list[Tensor] = []
        self._started = time.perf_counter()

    @property
    def is_done(self) -> bool:
        return self.stopped_early or self.step >= self.num_steps

    @property
    def eval_every(self) -> int:
        if self.settings.evals_per_epoch:
            return max(1, self.feed.steps_per_epoch // self.settings.evals_per_epoch)
        return self.settings.eval_every or max(1, self.num_steps // EVALS)

    @property
    def save_every(self) -> int:
        """0: only the last step."""
        if self.settings.saves_per_epoch:
            return max(1, self.feed.steps_per_epoch // self.settings.saves_per_epoch)
        return self.settings.save_every

    @property
    def best_eval(self) -> EvalRecord | None:
        trained = [record for record in self.evals if record.step]
        return min(trained, key=lambda record: record.eval_loss, default=None)

    def next_share(self) -> Share:
        """What this job brings to the next pass."""
        if not self._passes:
            self._begin_step()
        return self._passes.pop(0)

    def note(self, losses: Tensor) -> None:
        """The losses of the share that was just run, one a learnt token."""
        self._losses.append(losses.detach().double().sum())

    @property
    def is_step_complete(self) -> bool:
        return not self._passes

    def advance(self) -> StepRecord:
        """The optimiser step that the gradients are for; waits for the device once. Raises
        TrainError instead when loss or gradient is not finite."""
        length = clip(self.lora.parameters(), self.settings.max_grad_norm)
        *parts, norm = torch.stack((*self._losses, length.double())).tolist()
        loss = sum(parts) / self._num_learnt
        check_finite(self.settings.name, loss, norm)
        rate = learning_rate(self.settings, self.step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.step += 1
        now = time.perf_counter()
        record = StepRecord(self.step, loss, rate, norm, self._num_tokens, now - self._started)
        self.steps.append(record)
        return record

    def abandon_step(self) -> None:
        """Forget a step that is not complete; the next one begins anew."""
        self._passes.clear()
        self.optimizer.zero_grad(set_to_none=False)

    def is_eval_due(self) -> bool:
        if self.held is None or (self.evals and self.evals[-1].step == self.step):
            return False
        return self.is_done or self.step % self.eval_every == 0

    def evaluate(self, base: Base) -> EvalRecord:
        """Loss on the held-out rows; keeps the best weights, and stops early if so set."""
        assert self.held is not None
        loss = mean_loss(base, self.lora, self.held.documents, eval_tokens(self.settings))
        record = EvalRecord(self.step, loss)
        self.evals.append(record)
        if self.step and self.settings.keep_best and record == self.best_eval:
            tensors = self.lora.tensors()
            self.best = {name: t.to("cpu", copy=True) for name, t in tensors.items()}
        self.stopped_early = self._has_stalled()
        return record

    def is_save_due(self) -> bool:
        every = self.save_every
        return self.is_done or bool(every and self.step and self.step % every == 0)

    def keep_best(self) -> int:
        """Go back to the best weights, if there are any; the step that they are from."""
        best = self.best_eval
        if self.best is None or best is None:
            return self.step
        self.lora.load(self.best)
        return best.step

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides tensors."""
        return {
            "step": self.step,
            "stopped_early": self.stopped_early,
            "evals": [asdict(record) for record in self.evals],
            "steps": [asdict(record) for record in self.steps],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.step, self.stopped_early = state["step"], state["stopped_early"]
        self.evals = [EvalRecord(**record) for record in state["evals"]]
        self.steps = [StepRecord(**record) for record in state["steps"]]

    def _begin_step(self) -> None:
        documents = self.feed.passes(self.step)
        self._num_learnt = sum(d.num_learnt for part in documents for d in part)
        self._num_tokens = sum(len(d.token_ids) for part in documents for d in part)
        self._losses, self._started = [], time.perf_counter()
        self._passes = [
            Share(
                part,
                self.lora,
                weight=1.0 / self._num_learnt,
                seed=f"{self.settings.seed} {self.step} {i}",
                neftune=self.settings.neftune,
            )
            for i, part in enumerate(documents)
        ]

    def _has_stalled(self) -> bool:
        patience, best = self.settings.early_stopping, self.best_eval
        if not patience or best is None:
            return False
        return sum(record.step > best.step for record in self.evals) >= patience


def make_feed(settings: JobConfig, data: DataSet) -> Feed:
    return Feed(
        data.documents,
        batch=settings.batch,
        accumulation=settings.accumulation,
        seed=settings.seed,
        pack_length=settings.max_length if settings.packing else 0,
    )


def eval_tokens(settings: JobConfig) -> int:
    """Of one pass of an evaluation, about."""
    return max(2048, settings.max_length * settings.batch)


def num_steps(settings: JobConfig, feed: Feed) -> int:
    """`steps`, or what `epochs` come to."""
    return settings.steps or max(1, round(settings.epochs * feed.steps_per_epoch))
