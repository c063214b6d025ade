"""The engine: submit, abort, step. *Schedule, run, commit, publish.*

On an asynchronous runner a step is launched before the results of the last one are read, so the
device never waits for the host: tokens that are not known yet are placeholders, and a row of a
sequence that turns out to have ended is discarded. Knows requests, generations and text; no names,
no tenants' rights, no sockets. One thread calls it. Invariant: every submitted sequence ends in
exactly one event with a finish_reason, whatever fails; a fault in a step ends that step's sequences
and nothing else.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import msgspec
from tokenizers import Tokenizer

from loriner.adapters.loaders import Source
from loriner.adapters.registry import Registry
from loriner.config import EngineConfig
from loriner.core import UNKNOWN, Event, FinishReason, Request, Sequence, TokenLogprob
from loriner.engine.batch import BatchBuilder
from loriner.engine.detokenizer import Detokenizer
from loriner.engine.guides import Guides
from loriner.engine.kv_cache import BlockManager
from loriner.engine.readings import Embedding, PromptLogprobs, Read
from loriner.engine.runner import Pending, Runner
from loriner.engine.runs import Run
from loriner.engine.sampler import Sampled
from loriner.engine.scheduler import Scheduler
from loriner.engine.snapshots import Counters
from loriner.engine.token_names import TokenNames
from loriner.errors import EngineFailedError, LorinerError

logger = logging.getLogger(__name__)

LOAD_ROWS = 8


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step, and who has rows in it."""

    runs: list[Run]
    sampled: tuple[Run, ...]  # in the order of the tokens
    read: tuple[Run, ...]  # in the order of what is read of prompts
    pending: Pending


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
        self._eos = runner.model_config.eos_token_ids
        vocab_size = runner.model_config.vocab_size
        self.guides = Guides(tokenizer.to_str(), vocab_size, self._eos, on_loaded)
        self.pool = runner.make_pool(config.max_seats, on_loaded)
        self.registry = Registry(source, self.pool, config.host_bytes, on_loaded)
        self.blocks = BlockManager(runner.num_blocks, config.block_size, config.prefix_cache)
        self.scheduler = Scheduler(
            self.blocks,
            self.registry,
            max_sequences=config.max_sequences,
            max_step_tokens=config.step_tokens(runner.usual_step_tokens),
            load_of=self._load_of,
        )
        self.counters = Counters()
        self._builder = BatchBuilder(self.blocks)
        self._flights: deque[Flight] = deque()  # launched, oldest first; their results not read
        self._depth = 1 if runner.is_async else 0  # of them after a step
        self._sequences: dict[str, dict[int, Sequence]] = {}  # request id -> choice -> sequence
        self._text: dict[Sequence, Detokenizer] = {}
        self._alone: dict[int, str] = {}  # the text of a token alone; at most the vocabulary
        self._names = TokenNames(tokenizer)
        self.ran = False  # whether the last step had anything to run or to read

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._flights)

    def submit(self, request: Request) -> None:
        """Queue the request's `n` sequences. The caller has validated it and pinned its
        generation."""
        params = request.sampling
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self._sequences[request.request_id] = {}
        for index in range(params.n):
            own_seed = seed + index * 0xD1342543DE82EF95
            sequence = Sequence(request, index, own_seed, self.runner.max_len)
            sequence.needs_host = self.runner.needs_host(params)
            if sequence.reads_prompt:
                sequence.reading = Embedding() if request.embeds else PromptLogprobs(self._names)
            self._sequences[request.request_id][index] = sequence
            self._text[sequence] = Detokenizer(
                self.tokenizer,
                params.stop,
                params.include_stop_str_in_output,
                None if params.special_text else self._alone,
                skip_special=not params.special_text,
            )
        sequences = list(self._sequences[request.request_id].values())
        if params.grammar is not None:
            self.guides.want(sequences)  # they join when it is compiled
            return
        for sequence in sequences:
            self.scheduler.add(sequence)

    def abort(self, request_id: str) -> list[Event]:
        """End what is left of a request; its blocks and pins are free when this returns."""
        left = list(self._sequences.get(request_id, {}).values())
        self.counters.num_aborted += len(left)
        return [self._end(sequence, FinishReason.ABORT) for sequence in left]

    def keep(self, generations: Iterable[str]) -> None:
        """Load these and hold them whatever else wants their seats; let all others go."""
        self.registry.keep(generations)

    def step(self) -> list[Event]:
        """Launch one batch, and read the results of the one before (of the same one, on a
        synchronous runner). Returns what to publish."""
        self.registry.poll()
        events = self._take_guided()
        runs = self.scheduler.schedule()
        events += [self._fail(s, error) for s, error in self.scheduler.failed]
        self.scheduler.failed.clear()
        self.ran = bool(runs or self._flights)
        if runs:
            try:
                self._launch(runs)
            except Exception as error:  # noqa: BLE001  `_fail_step` logs it
                events += self._read(0)
                return events + self._fail_step(runs, error)
        return events + self._read(self._depth if runs else 0)

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
                    events.append(self._fail(sequence, compiled.error))
                else:
                    self.scheduler.add(sequence)
        return events

    def _launch(self, runs: list[Run]) -> None:
        batch = self._builder.build(runs)
        self.guides.begin([run.sequence.guide for run in batch.sampled])
        pending = self.runner.launch(batch.step)
        for run in runs:
            run.sequence.num_computed = run.start + run.num_rows
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

    def _fail_step(self, runs: list[Run], error: Exception) -> list[Event]:
        """End all that had rows in a step which failed, except what has ended since. Raises what
        the runner raises when it cannot go on: then the process has to."""
        logger.error("a step of %d sequences failed", len(runs), exc_info=error)
        self.runner.check()
        return [self._fail(run.sequence, error) for run in runs if not run.sequence.done]

    def _commit(self, flight: Flight, sampled: list[Sampled], read: list[Read]) -> list[Event]:
        self.counters.num_steps += 1
        chosen = list(zip(flight.sampled, sampled, strict=True))
        told = list(zip(flight.read, read, strict=True))
        broken = {run.sequence for run, choice in chosen if choice.token_id is None}
        broken |= {run.sequence for run, one in told if not one.finite}
        for run in flight.runs:
            end = run.start + run.num_rows
            if end <= run.sequence.num_prompt:
                self.counters.num_prompt_tokens += run.num_rows
            if run.holds and run.sequence not in broken:
                self.blocks.commit(run.sequence, end)
        events = []
        for run, one in told:
            if run.sequence.reads_prompt:
                events += self._taken(run.sequence, partial(self._learn_prompt, run, one))
        for run, choice in chosen:
            if not run.sequence.done:
                advance = partial(self._advance, run.sequence, run.start + run.num_rows, choice)
                events += self._taken(run.sequence, advance)
        return events

    def _taken(self, sequence: Sequence, take: Callable[[], Event | None]) -> list[Event]:
        """What `take` gives; what goes wrong in it is about this sequence, so it ends this one."""
        try:
            event = take()
        except Exception as error:
            logger.exception("request %s failed", sequence.request.request_id)
            event = self._fail(sequence, error)
        return [] if event is None else [event]

    def _advance(self, sequence: Sequence, place: int, choice: Sampled) -> Event:
        """The token at `place` is known: decide whether the sequence ends with it."""
        if choice.token_id is None:
            return self._fail(sequence, EngineFailedError("The model's output was not finite."))
        num_output = place - sequence.num_prompt + 1
        if num_output == 1:
            self.counters.num_cached_tokens += sequence.num_cached
        self.counters.num_output_tokens += 1
        params, token_id = sequence.request.sampling, choice.token_id
        sequence.learn(place, token_id)
        if (guide := sequence.guide) is not None:
            guide.accept(token_id)
        stops = token_id in params.stop_token_ids
        if stops or (token_id in self._eos and not params.ignore_eos):
            stop_reason = token_id if stops else None
            return self._end(sequence, FinishReason.STOP, stop_reason, choice)
        text, stop = self._text[sequence].push(token_id, can_stop=num_output > params.min_tokens)
        if stop is not None:
            return self._end(sequence, FinishReason.STOP, stop, choice, text, flush=False)
        if guide is not None and guide.finished:
            return self._end(sequence, FinishReason.STOP, None, choice, text)
        if sequence.num_known >= sequence.limit:
            return self._end(sequence, FinishReason.LENGTH, None, choice, text)
        return self._event(sequence, choice, text)

    def _learn_prompt(self, run: Run, read: Read) -> Event | None:
        """Rows of a prompt are read: the last event of a sequence that wants no token."""
        sequence, reading = run.sequence, run.sequence.reading
        if not read.finite:
            return self._fail(sequence, EngineFailedError("The model's output was not finite."))
        reading.take(run.start, min(run.end, sequence.num_prompt), read)
        if reading.num_read < sequence.num_prompt:
            return None
        sequence.reads_prompt = False
        if isinstance(reading, Embedding):
            return self._end(sequence, FinishReason.STOP, embedding=reading.vector())
        return None if sequence.generates else self._end(sequence, FinishReason.LENGTH)

    def _event(self, sequence: Sequence, choice: Sampled | None, text: str) -> Event:
        return Event(
            request_id=sequence.request.request_id,
            index=sequence.index,
            text=text,
            token_ids=() if choice is None or choice.token_id is None else (choice.token_id,),
            logprobs=self._names.logprobs(choice),
            prompt_logprobs=self._prompt_logprobs(sequence),
            num_prompt_tokens=sequence.num_prompt,
            num_cached_tokens=sequence.num_cached,
            num_output_tokens=sequence.num_output,
            cold_start=sequence.cold_start,
        )

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        stop_reason: str | int | None = None,
        choice: Sampled | None = None,
        text: str = "",
        *,
        flush: bool = True,
        embedding: bytes = b"",
        error: Exception | None = None,
    ) -> Event:
        """Free everything the sequence holds, and make its last event."""
        sequence.done, sequence.reads_prompt = True, False
        detokenizer = self._text.pop(sequence)
        lost = reason in (FinishReason.ABORT, FinishReason.ERROR)
        text += detokenizer.flush() if flush and not lost else ""
        self.scheduler.finish(sequence)
        choices = self._sequences[sequence.request.request_id]
        del choices[sequence.index]
        if not choices:
            del self._sequences[sequence.request.request_id]
        known = isinstance(error, LorinerError)
        return msgspec.structs.replace(
            self._event(sequence, choice, text),
            finish_reason=reason,
            stop_reason=stop_reason,
            embedding=embedding,
            error=None if error is None else str(error) if known else "The engine failed.",
            error_kind=None
            if error is None
            else type(error).__name__
            if known
            else "EngineFailedError",
        )

    def _fail(self, sequence: Sequence, error: Exception) -> Event:
        return self._end(sequence, FinishReason.ERROR, error=error)

    def _prompt_logprobs(self, sequence: Sequence) -> tuple[TokenLogprob, ...]:
        """All of them, once, with the first choice's first token, or its end if it wants none."""
        reading = sequence.reading
        if not isinstance(reading, PromptLogprobs) or sequence.index:
            return ()
        if reading.num_read < sequence.num_prompt:
            return ()
        sequence.reading = None
        return reading.entries(sequence.token_ids[0])
