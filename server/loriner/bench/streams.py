"""Streams that go on decoding in an engine, and the gaps between their tokens, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loriner.bench import drive
from loriner.core import Event

if TYPE_CHECKING:
    from loriner.bench.target import Target

ROOM = 64  # tokens that must be left for another load to begin


class Streams:
    """One for each of `generations`, as long as the engine's longest context."""

    def __init__(self, target: Target, generations: Sequence[str], prompt_len: int) -> None:
        self._target, self._engine = target, target.engine
        self._prompts = drive.Prompts(target.vocab_size, seed=1)
        self._num_asked = 0
        self._answered: set[str] = set()
        self._gaps: list[float] | None = None
        self._last = 0.0
        self.left = target.runner.max_len - prompt_len
        drive.warm(self._engine, self._prompts, generations)
        self._names = {f"stream-{i}" for i in range(len(generations))}
        for name, generation in zip(sorted(self._names), generations, strict=True):
            asked = drive.request(name, self._prompts.one(prompt_len), generation, self.left)
            self._engine.submit(asked)
        while self.step() < len(self._names):
            pass

    def has_room(self, num_steps: int = 0) -> bool:
        """Whether all streams go on for a while, and for so many steps after it."""
        return self.left - num_steps > ROOM

    def step(self) -> int:
        """One step of the engine; how many streams got a token in it."""
        events = drive.step(self._engine)
        now = time.perf_counter()
        num_tokens = sum(self._take(event) for event in drive.checked(events))
        if num_tokens:
            self.left -= 1
        if num_tokens == len(self._names):
            if self._gaps is not None and self._last:
                self._gaps.append(now - self._last)
            self._last = now
        return num_tokens

    def run(self, num_steps: int) -> None:
        """Just decode."""
        for _ in range(min(num_steps, self.left - ROOM)):
            self.step()

    def ask(self, generation: str, prompt_len: int) -> None:
        """One request of one token beside the streams; returns when it is answered."""
        name = f"ask-{self._num_asked}"
        self._num_asked += 1
        prompt = self._prompts.one(prompt_len)
        self._engine.submit(drive.request(name, prompt, generation, 1))
        while name not in self._answered:
            self.step()

    @contextmanager
    def gaps_into(self, gaps: list[float]) -> Iterator[None]:
        """Collect the gaps of the block's steps, in seconds."""
        self._gaps, self._last = gaps, 0.0
        try:
            yield
        finally:
            self._gaps = None

    def close(self) -> None:
        for name in self._names:
            self._engine.abort(name)
        while self._engine.has_work:
            drive.step(self._engine)

    def _take(self, event: Event) -> bool:
        if event.request_id in self._names:
            return bool(event.token_ids)
        self._answered.add(event.request_id)
        return False
