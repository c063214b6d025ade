"""A whole engine in the test's own process: built from a base folder, driven step by step,
watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from loriner.adapters.pool import SeatWeights
from loriner.config import MIB, EngineConfig
from loriner.core import Event, Request, Sequence
from loriner.engine.batch import Batch
from loriner.engine.engine import Engine
from loriner.engine.runner import Runner
from loriner.model.batch_meta import BatchMeta

Key = tuple[str, int]  # request id, choice


class RecordingRunner(Runner):
    """Keeps the logits of the last step, so that a test can compare them with an oracle's."""

    last_logits: Tensor

    def run(self, batch: BatchMeta) -> Tensor:
        self.last_logits = super().run(batch)
        return self.last_logits


class WatchedEngine(Engine):
    """Notes, for every sequence, the logits that each of its tokens was chosen from."""

    def __init__(
        self, config: EngineConfig, runner: Runner, source: Callable[[str], SeatWeights]
    ) -> None:
        tokenizer = Tokenizer.from_file(str(config.model / "tokenizer.json"))
        super().__init__(config, runner, tokenizer, source)
        self.logits: dict[Key, list[Tensor]] = {}
        self.outputs: dict[Key, list[int]] = {}
        self.text: dict[Key, str] = {}
        self.ends: dict[Key, Event] = {}
        self.max_mixed = 0  # most distinct adapters seen in one step
        build = self._builder.build

        def watched(runs: Iterable[object]) -> Batch:
            batch = build(runs)  # type: ignore[arg-type]
            self._sampled = batch.sampled
            self.max_mixed = max(self.max_mixed, len({r.sequence.generation for r in runs}))  # type: ignore[attr-defined]
            return batch

        self._builder.build = watched  # type: ignore[method-assign]
        self._sampled: tuple[Sequence, ...] = ()

    def step(self) -> list[Event]:
        self._sampled = ()
        events = super().step()
        if isinstance(self.runner, RecordingRunner):
            for row, sequence in enumerate(self._sampled):
                key = (sequence.request.request_id, sequence.index)
                self.logits.setdefault(key, []).append(self.runner.last_logits[row].clone())
        self.note(events)
        return events

    def note(self, events: Iterable[Event]) -> None:
        for event in events:
            key = (event.request_id, event.index)
            self.outputs.setdefault(key, []).extend(event.token_ids)
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
    small = {"kv_bytes": 64 * MIB, "max_sequences": 16, "num_threads": 1, "device": "cpu"}
    return EngineConfig(model=model, **{**small, **overrides})  # type: ignore[arg-type]


def build_engine(
    config: EngineConfig, weights: Mapping[str, SeatWeights], runner: Runner | None = None
) -> WatchedEngine:
    """An engine whose adapters are `weights` by generation; `runner` may be shared between engines
    that do not run at the same time."""
    torch.manual_seed(0)
    return WatchedEngine(config, runner or RecordingRunner(config), weights.__getitem__)
