"""The engine: submit, abort, step. *Schedule, run, commit, publish.*

On an asynchronous runner a step is launched before the results of the last one are read, so the
device never waits for the host: tokens that are not known yet are placeholders, and a row of a
sequence that turns out to have ended is discarded. Knows requests and generations; no names, no
tenants' rights, no sockets. One thread calls it. Invariant: a fault in a step ends that step's
sequences and nothing else.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from tokenizers import Tokenizer

from loriner.adapters.loaders import Source
from loriner.adapters.registry import Registry
from loriner.config import EngineConfig
from loriner.core import UNKNOWN, Event, Guide, Request, Sequence
from loriner.engine.answers import Answers
from loriner.engine.batch import BatchBuilder
from loriner.engine.guides import Guides
from loriner.engine.kv_cache import BlockManager
from loriner.engine.readings import Read
from loriner.engine.runner import Pending, Runner
from loriner.engine.runs import Run
from loriner.engine.sampler import Sampled
from loriner.engine.scheduler import Scheduler
from loriner.engine.snapshots import Counters

logger = logging.getLogger(__name__)

LOAD_ROWS = 8


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step, and who has rows in it."""

    runs: list[Run]
    sampled: tuple[Run, ...]  # in the order of the tokens
    read: tuple[Run, ...]  # in the order of what is read of prompts
    pending: Pending

    @property
    def is_guided(self) -> bool:
        return any(run.sequence.guide is not None for run in self.sampled)

    @property
    def guides(self) -> list[Guide | None]:
        """Of the rows in `sampled`, but of those whose sequence has ended."""
        return [None if run.sequence.done else run.sequence.guide for run in self.sampled]


class Engine:
    """Continuous batching of base and adapter sequences on one runner."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        tokenizer: Tokenizer,
        source: Source,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        model = runner.model_config
        eos_ids = model.eos_token_ids
        self.guides = Guides(tokenizer.to_str(), model.vocab_size, eos_ids, on_loaded)
        self.pool = runner.make_pool(config.max_seats, on_loaded)
        self.registry = Registry(source, self.pool, config.host_bytes, on_loaded)
        self.blocks = BlockManager(runner.num_blocks, config.block_size, config.prefix_cache)
        self.scheduler = Scheduler(
            self.blocks,
            self.registry,
            max_sequences=config.max_sequences,
            max_step_tokens=config.step_tokens(runner.usual_step_tokens),
            shared_step_tokens=config.shared_step_tokens(runner.shared_step_tokens),
            load_of=self._load_of,
        )
        self.counters = Counters()
        self._answers = Answers(tokenizer, eos_ids, self.counters, self.scheduler.finish)
        self._builder = BatchBuilder(self.blocks)
        self._flights: deque[Flight] = deque()  # launched, oldest first; their results not read
        self._depth = 1 if runner.is_async else 0  # of them after a step
        self.ran = False  # whether the last step had anything to run or to read

    @property
    def has_work(self) -> bool:
        return bool(self._answers or self._flights)

    def submit(self, request: Request) -> None:
        """Queue the request's `n` sequences. The caller has validated it and pinned its
        generation."""
        params = request.sampling
        seed = secrets.randbits(64) if params.seed is None else params.seed
        sequences = []
        for index in range(params.n):
            own_seed = seed + index * 0xD1342543DE82EF95
            sequence = Sequence(request, index, own_seed, self.runner.max_len)
            sequence.needs_host = self.runner.needs_host(params)
            sequences.append(sequence)
        self._answers.open(sequences)
        if params.grammar is not None:
            self.guides.want(sequences)  # they join when it is compiled
            return
        for sequence in sequences:
            self.scheduler.add(sequence)

    def abort(self, request_id: str) -> list[Event]:
        """End what is left of a request; its blocks and pins are free when this returns."""
        return self._answers.abort(request_id)

    def keep(self, generations: Iterable[str]) -> None:
        """Load these and hold them whatever else wants their seats; let all others go."""
        self.registry.keep(generations)

    def step(self) -> list[Event]:
        """Launch one batch, and read the results of the one before (of the same one, on a
        synchronous runner). Returns what to publish."""
        self.registry.poll()
        events = self._take_guided()
        runs = self.scheduler.schedule()
        events += [self._answers.fail(s, error) for s, error in self.scheduler.failed]
        self.scheduler.failed.clear()
        self.ran = bool(runs or self._flights)
        if runs:
            try:
                self._launch(runs)
            except Exception as error:  # noqa: BLE001  `_fail_step` logs it
                events += self._read(0)
                return events + self._fail_step(runs, error)
        events += self._read(self._depth if runs else 0)
        return events + self._choose()

    def check_integrity(self) -> None:
        """Assert the invariants of every allocator; cheap enough to call whenever idle."""
        self.blocks.check_integrity()
        self.pool.check_integrity()
        assert self.has_work or self.blocks.num_free == self.blocks.num_blocks

    def close(self) -> None:
        self._read(0)
        self.guides.close()
        self.registry.close()

    def _load_of(self, generation: str) -> float:
        """What a token of it costs, counted in tokens of the base: bytes read in a step of
        `LOAD_ROWS` rows, each its own adapter."""
        share = max(self.runner.operand_bytes, 1) / LOAD_ROWS
        return 1.0 + self.registry.known(generation).num_bytes / share

    def _take_guided(self) -> list[Event]:
        """Queue the sequences whose grammars have been compiled."""
        events = []
        for compiled in self.guides.take():
            for sequence in compiled.sequences:
                if sequence.done:
                    continue
                if compiled.error is not None:
                    events.append(self._answers.fail(sequence, compiled.error))
                else:
                    self.scheduler.add(sequence)
        return events

    def _launch(self, runs: list[Run]) -> None:
        batch = self._builder.build(runs)
        if not self._depth:
            self.guides.begin([run.sequence.guide for run in batch.sampled], as_ids=True)
        pending = self.runner.launch(batch.step)
        for run in runs:
            run.sequence.num_computed = run.end
        for place, run in enumerate(batch.sampled):
            run.sequence.token_ids.append(UNKNOWN)
            run.sequence.source = place
        self._flights.append(Flight(runs, batch.sampled, batch.read, pending))

    def _read(self, depth: int) -> list[Event]:
        """Take in the results of all launched steps but the last `depth`."""
        events: list[Event] = []
        while len(self._flights) > depth:
            flight = self._flights.popleft()
            try:
                sampled = flight.pending.result()
                read = flight.pending.read()
            except Exception as error:  # noqa: BLE001  `_fail_step` logs it
                events += self._fail_step(flight.runs, error)
            else:
                events += self._commit(flight, sampled, read)
        return events

    def _choose(self) -> list[Event]:
        """Choose the guided rows' tokens of the step that was just launched: what may follow was
        not known before those of the step ahead of it were read."""
        if not self._flights or not (flight := self._flights[-1]).is_guided:
            return []
        try:
            self.guides.begin(flight.guides, as_ids=False)
            flight.pending.choose()
        except Exception as error:  # noqa: BLE001  `_fail_step` logs it
            self._flights.pop()
            return self._fail_step(flight.runs, error)
        return []

    def _fail_step(self, runs: list[Run], error: Exception) -> list[Event]:
        """End all that had rows in a step which failed, except what has ended since. Raises what
        the runner raises when it cannot go on: then the process has to."""
        logger.error("a step of %d sequences failed", len(runs), exc_info=error)
        self.runner.check()
        return [self._answers.fail(run.sequence, error) for run in runs if not run.sequence.done]

    def _commit(self, flight: Flight, sampled: list[Sampled], read: list[Read]) -> list[Event]:
        self.counters.num_steps += 1
        chosen = list(zip(flight.sampled, sampled, strict=True))
        told = list(zip(flight.read, read, strict=True))
        broken = {run.sequence for run, choice in chosen if choice.token_id is None}
        broken |= {run.sequence for run, one in told if not one.finite}
        for run in flight.runs:
            end = run.end
            if end <= run.sequence.num_prompt:
                self.counters.num_prompt_tokens += run.num_rows
            if run.holds and run.sequence not in broken:
                self.blocks.commit(run.sequence, end)
        events = []
        for run, one in told:
            if run.sequence.reads_prompt:
                events += self._taken(run.sequence, partial(self._answers.learn_prompt, run, one))
        for run, choice in chosen:
            if not run.sequence.done:
                advance = partial(self._answers.advance, run.sequence, run.end, choice)
                events += self._taken(run.sequence, advance)
        return events

    def _taken(self, sequence: Sequence, take: Callable[[], Event | None]) -> list[Event]:
        """What `take` gives; what goes wrong in it is about this sequence, so it ends this one."""
        try:
            event = take()
        except Exception as error:
            logger.exception("request %s failed", sequence.request.request_id)
            event = self._answers.fail(sequence, error)
        return [] if event is None else [event]
