"""A whole engine in the test's own process: built from a base folder, driven step by step,
watched."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from loriner.adapters import formats
from loriner.adapters.loaders import Source
from loriner.adapters.pool import SeatWeights, pack
from loriner.config import MIB, EngineConfig
from loriner.core import UNKNOWN, Event, Request, SamplingParams
from loriner.engine.batch import Batch
from loriner.engine.cpu_runner import CpuRunner
from loriner.engine.engine import Engine
from loriner.engine.readings import Read
from loriner.engine.runner import Runner
from loriner.engine.runs import Run
from loriner.engine.sampler import Sampled, sample
from loriner.engine.step_input import StepInput
from loriner.model.batch_meta import BatchMeta
from loriner.model.config import ModelConfig
from loriner.model.transformer import layout

Key = tuple[str, int]  # request id, choice


class RecordingRunner(CpuRunner):
    """Keeps the logits of the last step, so that a test can compare them with an oracle's."""

    last_logits: Tensor

    def run(self, batch: BatchMeta) -> Tensor:
        self.last_logits = super().run(batch)
        return self.last_logits


class LateRunner(CpuRunner):
    """A CPU runner that behaves as a GPU does: a step runs some time after its launch, tokens that
    the host does not know come from the step before, and what it reads later is what it was given.
    """

    is_async = True

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.reset()

    def reset(self) -> None:
        """For another engine."""
        self.launched: list[StepInput] = []
        self.broken: set[int] = set()  # launches (from 0) whose result cannot be read
        self._queue: deque[LateStep] = deque()
        self._ids = torch.empty(0, dtype=torch.int64)  # of the last step that ran

    def needs_host(self, params: SamplingParams) -> bool:
        return bool(params.looks_back or params.logit_bias or params.min_tokens)

    def launch(self, step: StepInput) -> LateStep:  # type: ignore[override]
        assert len(self._queue) <= 1, "two steps are under way already"
        unknown = np.flatnonzero(step.token_source >= 0)
        if len(unknown):
            assert self.launched and step.token_source.max() < len(self.launched[-1].draws)
        ahead = set(unknown.tolist())
        for row, draw in zip(step.sample_rows.tolist(), step.draws, strict=True):
            assert row not in ahead or not self.needs_host(draw.params), (
                "launched over an unknown token"
            )
            assert UNKNOWN not in draw.token_ids
        made = LateStep(self, len(self.launched), step, self.meta(step))
        self.launched.append(step)
        self._queue.append(made)
        return made

    def catch_up(self, step: LateStep) -> None:
        """Run what was launched, up to `step`."""
        while step in self._queue:
            self._queue.popleft().run()

    def feed(self, step: StepInput) -> Tensor:
        source = torch.from_numpy(step.token_source).long()
        known = torch.from_numpy(step.token_ids).long()
        if not len(self._ids):
            return known
        return torch.where(source >= 0, self._ids[source.clamp(min=0)], known)


class LateStep:
    """One launched step of a `LateRunner`."""

    def __init__(self, runner: LateRunner, index: int, step: StepInput, meta: BatchMeta) -> None:
        self._runner, self._index, self._step, self._meta = runner, index, step, meta
        self._sampled: list[Sampled] = []
        self._reader = runner.reader(step.readings)

    def run(self) -> None:
        runner, fed = self._runner, self._runner.feed(self._step)
        meta = dataclasses.replace(self._meta, token_ids=fed, reader=self._reader)
        logits = runner.run(meta)
        # A guide that was not asked is of a sequence that has ended.
        draws = [
            d._replace(guide=None) if d.guide is not None and d.guide.words() is None else d
            for d in self._step.draws
        ]
        self._sampled = sample(logits, draws, runner.model_config.eos_token_ids)
        chosen = [0 if s.token_id is None else s.token_id for s in self._sampled]
        runner._ids = torch.tensor(chosen, dtype=torch.int64)

    def choose(self) -> None:
        """It is not even run yet."""
        assert self._runner._queue[-1] is self

    def result(self) -> list[Sampled]:
        self._runner.catch_up(self)
        if self._index in self._runner.broken:
            raise RuntimeError("secret internals")
        return self._sampled

    def read(self) -> list[Read]:
        return self._reader.copied().told()


class WatchedEngine(Engine):
    """Notes, for every sequence, the logits that each of its tokens was chosen from."""

    def __init__(self, config: EngineConfig, runner: Runner, source: Source) -> None:
        tokenizer = Tokenizer.from_file(str(config.model / "tokenizer.json"))
        self._loaded = threading.Event()
        super().__init__(config, runner, tokenizer, source, self._loaded.set)
        self.logits: dict[Key, list[Tensor]] = {}
        self.outputs: dict[Key, list[int]] = {}
        self.text: dict[Key, str] = {}
        self.logprobs: dict[Key, list[float]] = {}  # of the tokens, where they were asked for
        self.ends: dict[Key, Event] = {}
        self.max_mixed = 0  # most distinct adapters seen in one step
        self._sampled: tuple[Run, ...] = ()
        build = self._builder.build

        def watched(runs: list[Run]) -> Batch:
            batch = build(runs)
            self._sampled = batch.sampled
            self.max_mixed = max(self.max_mixed, len({r.sequence.generation for r in runs}))
            return batch

        self._builder.build = watched  # type: ignore[method-assign, assignment]

    def step(self) -> list[Event]:
        self._sampled = ()
        self._loaded.clear()
        events = super().step()
        if not self.ran:
            self._loaded.wait(0.01)  # a loop that spins keeps loaders' threads from running
        if isinstance(self.runner, RecordingRunner):
            for row, run in enumerate(self._sampled):
                sequence = run.sequence
                key = (sequence.request.request_id, sequence.index)
                self.logits.setdefault(key, []).append(self.runner.last_logits[row].clone())
        self.note(events)
        return events

    def note(self, events: Iterable[Event]) -> None:
        for event in events:
            key = (event.request_id, event.index)
            self.outputs.setdefault(key, []).extend(event.token_ids)
            self.logprobs.setdefault(key, []).extend(one.logprob for one in event.logprobs)
            self.text[key] = self.text.get(key, "") + event.text
            if event.finish_reason is not None:
                assert key not in self.ends, "a sequence ended twice"
                self.ends[key] = event

    def run_all(self, requests: Iterable[Request] = ()) -> None:
        """Submit and step until nothing is left."""
        for request in requests:
            self.submit(request)
        while self.has_work:
            self.step()
        self.check_integrity()


def engine_config(model: Path, **overrides: object) -> EngineConfig:
    small: dict[str, object] = {
        "kv_bytes": 64 * MIB,
        "max_sequences": 16,
        "max_step_tokens": 512,
        "num_threads": 1,
        "device": "cpu",
    }
    return EngineConfig(model=model, **{**small, **overrides})  # type: ignore[arg-type]


def build_engine(
    config: EngineConfig, weights: Mapping[str, SeatWeights], runner: Runner | None = None
) -> WatchedEngine:
    """An engine whose adapters are `weights` by generation; `runner` may be shared between engines
    that do not run at the same time."""
    torch.manual_seed(0)
    return WatchedEngine(config, runner or RecordingRunner(config), weights.__getitem__)


def seat_weights(
    config: ModelConfig, folder: Path, names: Iterable[str]
) -> Mapping[str, SeatWeights]:
    """The adapters of these names in `folder`, packed in f32 as a CPU engine seats them."""
    placed, modules = layout(config), config.modules()
    return {
        name: pack(formats.load(folder / name, modules), placed, torch.float32) for name in names
    }
