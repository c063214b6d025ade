"""The engine: submit, abort, step. *Schedule, run, commit, publish.*

Knows requests, generations and text; no names, no tenants' rights, no sockets. One thread calls it.
Invariant: every submitted sequence ends in exactly one event with a finish_reason, whatever fails;
a fault in a step ends that step's sequences and nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer

from loriner.adapters.pool import Pool, SeatWeights
from loriner.adapters.registry import Registry
from loriner.config import EngineConfig
from loriner.core import (
    EngineStats,
    Event,
    FinishReason,
    GenerationStats,
    Request,
    Sequence,
    TokenLogprob,
)
from loriner.engine.batch import BatchBuilder
from loriner.engine.detokenizer import Detokenizer
from loriner.engine.kv_cache import BlockManager
from loriner.engine.runner import Runner
from loriner.engine.sampler import Sampled, sample
from loriner.engine.scheduler import Run, Scheduler
from loriner.errors import EngineFailedError, LorinerError

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_aborted: int = 0


class Engine:
    """Continuous batching of base and adapter sequences on one runner."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        tokenizer: Tokenizer,
        source: Callable[[str], SeatWeights],
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.pool = Pool(config.pool_bytes, config.max_seats)
        self.registry = Registry(source, self.pool, config.host_bytes, on_loaded)
        self.blocks = BlockManager(runner.kv.num_blocks, config.block_size, config.prefix_cache)
        self.scheduler = Scheduler(
            self.blocks,
            self.registry,
            max_sequences=config.max_sequences,
            max_step_tokens=config.max_step_tokens,
        )
        self.counters = Counters()
        self._builder = BatchBuilder(self.pool, runner.ops, config.block_size)
        self._eos = runner.model_config.eos_token_ids
        self._sequences: dict[str, dict[int, Sequence]] = {}  # request id -> choice -> sequence
        self._text: dict[Sequence, Detokenizer] = {}
        self.ran = False  # whether the last step had anything to run

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def submit(self, request: Request) -> None:
        """Queue the request's `n` sequences. The caller has validated it and pinned its
        generation."""
        params = request.sampling
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self._sequences[request.request_id] = {}
        for index in range(params.n):
            sequence = Sequence(request, index, seed + index * 0xD1342543DE82EF95)
            self._sequences[request.request_id][index] = sequence
            self._text[sequence] = Detokenizer(
                self.tokenizer, params.stop, params.include_stop_str_in_output
            )
            self.scheduler.add(sequence)

    def abort(self, request_id: str) -> list[Event]:
        """End what is left of a request; its blocks and pins are free when this returns."""
        left = list(self._sequences.get(request_id, {}).values())
        self.counters.num_aborted += len(left)
        return [self._end(sequence, FinishReason.ABORT) for sequence in left]

    def keep(self, generations: Iterable[str]) -> None:
        """Load these and hold them whatever else wants their seats; let all others go."""
        self.pool.kept = frozenset(generations)
        for generation in self.pool.kept:
            self.registry.prefetch(generation)

    def step(self) -> list[Event]:
        """Run one batch. Returns what to publish; empty when there was nothing to run."""
        self.registry.poll()
        runs = self.scheduler.schedule()
        events = [self._fail(s, error) for s, error in self.scheduler.failed]
        self.scheduler.failed.clear()
        self.ran = bool(runs)
        if not runs:
            return events
        try:
            batch = self._builder.build(runs)
            logits = self.runner.run(batch.meta)
            sampled = sample(logits, batch.sampled, self._eos)
        except Exception as error:
            logger.exception("a step failed; its %d sequences end with an error", len(runs))
            return events + [self._fail(run.sequence, error) for run in runs]
        return events + self._commit(runs, batch.sampled, sampled)

    def stats(self) -> EngineStats:
        scheduler, counters = self.scheduler, self.counters
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=self.blocks.num_blocks,
            num_free_blocks=self.blocks.num_free,
            block_size=self.blocks.block_size,
            pool_bytes=self.pool.budget_bytes,
            pool_used_bytes=self.pool.used_bytes,
            host_bytes=self.registry.host_bytes,
            host_used_bytes=self.registry.host_used_bytes,
            max_seats=self.pool.max_seats,
            num_steps=counters.num_steps,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_output_tokens=counters.num_output_tokens,
            num_cached_tokens=counters.num_cached_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_evictions=self.pool.num_evictions,
            num_aborted=counters.num_aborted,
            base_bytes=self.runner.checkpoint.num_bytes,
            operand_bytes=self.runner.model.num_bytes,
            generations=tuple(self._generation_stats()),
        )

    def check_integrity(self) -> None:
        """Assert the invariants of every allocator; cheap enough to call whenever idle."""
        self.blocks.check_integrity()
        self.pool.check_integrity()
        assert self.has_work or self.blocks.num_free == self.blocks.num_blocks

    def close(self) -> None:
        self.registry.close()

    def _commit(
        self, runs: Iterable[Run], sequences: Iterable[Sequence], sampled: Iterable[Sampled]
    ) -> list[Event]:
        self.counters.num_steps += 1
        chosen = list(zip(sequences, sampled, strict=True))
        broken = {sequence for sequence, choice in chosen if choice.token_id is None}
        for run in runs:
            run.sequence.num_computed += run.count
            if run.sequence not in broken:
                self.blocks.commit(run.sequence)
            if run.start + run.count <= run.sequence.num_prompt:
                self.counters.num_prompt_tokens += run.count
        return [self._try_advance(sequence, choice) for sequence, choice in chosen]

    def _try_advance(self, sequence: Sequence, choice: Sampled) -> Event:
        """`_advance`; what fails there is about this sequence's text, and ends this sequence."""
        try:
            return self._advance(sequence, choice)
        except Exception as error:
            logger.exception("request %s failed", sequence.request.request_id)
            return self._fail(sequence, error)

    def _advance(self, sequence: Sequence, choice: Sampled) -> Event:
        """Append one token and decide whether the sequence ends with it."""
        if choice.token_id is None:
            return self._fail(sequence, EngineFailedError("The model's output was not finite."))
        if sequence.num_output == 0:
            self.counters.num_cached_tokens += sequence.num_cached
        self.counters.num_output_tokens += 1
        params, token_id = sequence.request.sampling, choice.token_id
        sequence.token_ids.append(token_id)
        can_stop = sequence.num_output > params.min_tokens
        stops = token_id in params.stop_token_ids
        if stops or (token_id in self._eos and not params.ignore_eos):
            stop_reason = token_id if stops else None
            return self._end(sequence, FinishReason.STOP, stop_reason, choice)
        text, stop = self._text[sequence].push(token_id, can_stop=can_stop)
        if stop is not None:
            return self._end(sequence, FinishReason.STOP, stop, choice, text, flush=False)
        full = len(sequence.token_ids) >= self.runner.max_len
        if full or sequence.num_output == params.max_tokens:
            return self._end(sequence, FinishReason.LENGTH, None, choice, text)
        return self._event(sequence, choice, text)

    def _event(self, sequence: Sequence, choice: Sampled | None, text: str) -> Event:
        return Event(
            request_id=sequence.request.request_id,
            index=sequence.index,
            text=text,
            token_ids=() if choice is None or choice.token_id is None else (choice.token_id,),
            logprobs=self._logprobs(choice),
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
        error: Exception | None = None,
    ) -> Event:
        """Free everything the sequence holds, and make its last event."""
        detokenizer = self._text.pop(sequence)
        lost = reason in (FinishReason.ABORT, FinishReason.ERROR)
        text += detokenizer.flush() if flush and not lost else ""
        if sequence in self.scheduler.running or sequence in self.scheduler.waiting:
            self.scheduler.finish(sequence)
        choices = self._sequences[sequence.request.request_id]
        del choices[sequence.index]
        if not choices:
            del self._sequences[sequence.request.request_id]
        known = isinstance(error, LorinerError)
        return dataclasses.replace(
            self._event(sequence, choice, text),
            finish_reason=reason,
            stop_reason=stop_reason,
            error=None if error is None else str(error) if known else "The engine failed.",
            error_kind=None
            if error is None
            else type(error).__name__
            if known
            else "EngineFailedError",
        )

    def _fail(self, sequence: Sequence, error: Exception) -> Event:
        return self._end(sequence, FinishReason.ERROR, error=error)

    def _logprobs(self, choice: Sampled | None) -> tuple[TokenLogprob, ...]:
        if choice is None or choice.token_id is None or choice.logprob is None:
            return ()
        top = tuple(TokenLogprob(i, p, self._token(i)) for i, p in choice.top)
        return (TokenLogprob(choice.token_id, choice.logprob, self._token(choice.token_id), top),)

    def _token(self, token_id: int) -> str:
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False))

    def _generation_stats(self) -> Iterable[GenerationStats]:
        running = Counter(s.generation for s in self.scheduler.running)
        waiting = Counter(s.generation for s in self.scheduler.waiting)
        for generation, num_bytes, num_loads, last_load_s in self.registry.known():
            yield GenerationStats(
                generation=generation,
                tier=self.registry.tier(generation),
                pinned=generation in self.pool.kept,
                num_running=running[generation],
                num_waiting=waiting[generation],
                num_bytes=num_bytes,
                num_loads=num_loads,
                last_load_s=last_load_s,
            )
