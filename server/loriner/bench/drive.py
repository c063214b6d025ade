"""Requests into an engine, and when their tokens come out. Knows the engine's loop, no device."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loriner.bench.popularity import BASE
from loriner.core import Event, Request, SamplingParams
from loriner.errors import EngineFailedError

if TYPE_CHECKING:
    from loriner.engine.engine import Engine

IDLE_S = 1e-4
NO_TEXT = 259  # prompts are drawn from the ids beyond bytes and specials


@dataclass(slots=True)
class Trace:
    """What a loop saw. Times are perf_counter seconds."""

    first: dict[str, float] = field(default_factory=dict)  # request -> its first token
    full: list[float] = field(default_factory=list)  # steps in which every row got a token ...
    contexts: list[float] = field(default_factory=list)  # ... and their mean context
    num_tokens: int = 0
    begun: float = 0.0
    ended: float = 0.0

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring full steps."""
        return [b - a for a, b in zip(self.full, self.full[1:], strict=False)]


class Prompts:
    """Random prompts, none the beginning of another."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self._ids, self._draw = range(NO_TEXT, vocab_size), random.Random(seed)

    def one(self, length: int) -> tuple[int, ...]:
        return tuple(self._draw.choices(self._ids, k=length))


def request(
    name: str,
    prompt: tuple[int, ...],
    generation: str | None,
    max_tokens: int,
    *,
    logprobs: int | None = None,
) -> Request:
    """Greedy, and exactly `max_tokens` long."""
    sampling = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs
    )
    return Request(name, prompt, sampling, generation, arrival_s=time.monotonic())


def requests(
    prompts: Prompts,
    picks: Sequence[int],
    generation: Callable[[int], str],
    prompt_len: int,
    max_tokens: int,
) -> list[Request]:
    """One for each row; `picks` are the adapters' numbers."""
    return [
        request(
            f"row-{row}",
            prompts.one(prompt_len),
            None if pick == BASE else generation(pick),
            max_tokens,
        )
        for row, pick in enumerate(picks)
    ]


def run(
    engine: Engine,
    asked: Iterable[Request],
    on_full: Callable[[Trace], None] = lambda trace: None,
) -> Trace:
    """Submit all, step until they end. Raises EngineFailedError when one fails."""
    asked = list(asked)
    trace = Trace(begun=time.perf_counter())
    for one in asked:
        engine.submit(one)
    while engine.has_work:
        note(trace, step(engine), len(asked), on_full)
    trace.ended = time.perf_counter()
    return trace


def step(engine: Engine) -> list[Event]:
    """One step. Like `serve`, it leaves the loader threads alone when there is nothing to run."""
    events = engine.step()
    if not engine.ran:
        time.sleep(IDLE_S)
    return events


def checked(events: list[Event]) -> list[Event]:
    """`events`. Raises EngineFailedError when one tells of a failure."""
    for event in events:
        if event.error is not None:
            raise EngineFailedError(event.error)
    return events


def note(
    trace: Trace,
    events: list[Event],
    rows: int,
    on_full: Callable[[Trace], None] = lambda trace: None,
) -> None:
    now = time.perf_counter()
    for event in checked(events):
        trace.num_tokens += len(event.token_ids)
        if event.token_ids:
            trace.first.setdefault(event.request_id, now)
    if len(events) == rows and all(event.token_ids for event in events):
        trace.full.append(now)
        lengths = (event.num_prompt_tokens + event.num_output_tokens for event in events)
        trace.contexts.append(sum(lengths) / rows - 1)  # the newest token has not been a key yet
        on_full(trace)


def warm(engine: Engine, prompts: Prompts, generations: Iterable[str]) -> None:
    """Bring adapters to their seats, so that no measured step waits for one."""
    for i, generation in enumerate(dict.fromkeys(generations)):
        run(engine, [request(f"warm-{i}", prompts.one(1), generation, 1)])
