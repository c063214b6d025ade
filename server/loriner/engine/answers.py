"""What the engine answers: the text, the log-probabilities and the end of each open sequence.

Is told which tokens were chosen and what was read of prompts; knows no steps, no blocks and no
device. Invariant: every opened sequence ends in exactly one event with a finish_reason, and by then
`release` was called with it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import msgspec
from tokenizers import Tokenizer

from loriner.core import Event, FinishReason, Sequence, TokenLogprob
from loriner.engine.detokenizer import Detokenizer
from loriner.engine.readings import Embedding, PromptLogprobs, Read
from loriner.engine.runs import Run
from loriner.engine.sampler import Sampled
from loriner.engine.snapshots import Counters
from loriner.engine.token_names import TokenNames
from loriner.errors import EngineFailedError, LorinerError


class Answers:
    """Of one engine; falsy when no sequence is open."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_ids: tuple[int, ...],
        counters: Counters,
        release: Callable[[Sequence], None],
    ) -> None:
        """`release` frees all that a sequence holds."""
        self._tokenizer, self._eos = tokenizer, eos_ids
        self._counters, self._release = counters, release
        self._open: dict[str, dict[int, Sequence]] = {}  # request id -> choice -> sequence
        self._text: dict[Sequence, Detokenizer] = {}
        self._alone: dict[int, str] = {}  # the text of a token alone; at most the vocabulary
        self._names = TokenNames(tokenizer)

    def __bool__(self) -> bool:
        return bool(self._open)

    def open(self, sequences: Seq[Sequence]) -> None:
        """All sequences of one request."""
        request = sequences[0].request
        params = request.sampling
        self._open[request.request_id] = {sequence.index: sequence for sequence in sequences}
        for sequence in sequences:
            if sequence.reads_prompt:
                sequence.reading = Embedding() if request.embeds else PromptLogprobs(self._names)
            self._text[sequence] = Detokenizer(
                self._tokenizer,
                params.stop,
                params.include_stop_str_in_output,
                None if params.special_text else self._alone,
                skip_special=not params.special_text,
            )

    def advance(self, sequence: Sequence, place: int, choice: Sampled) -> Event:
        """The token at `place` is known: decide whether the sequence ends with it."""
        if choice.token_id is None:
            return self.fail(sequence, EngineFailedError("The model's output was not finite."))
        num_output = place - sequence.num_prompt + 1
        if num_output == 1:
            self._counters.num_cached_tokens += sequence.num_cached
        self._counters.num_output_tokens += 1
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

    def learn_prompt(self, run: Run, read: Read) -> Event | None:
        """Rows of a prompt are read: the last event of a sequence that wants no token."""
        sequence, reading = run.sequence, run.sequence.reading
        if not read.finite:
            return self.fail(sequence, EngineFailedError("The model's output was not finite."))
        reading.take(run.start, min(run.end, sequence.num_prompt), read)
        if reading.num_read < sequence.num_prompt:
            return None
        sequence.reads_prompt = False
        if isinstance(reading, Embedding):
            return self._end(sequence, FinishReason.STOP, embedding=reading.vector())
        return None if sequence.generates else self._end(sequence, FinishReason.LENGTH)

    def abort(self, request_id: str) -> list[Event]:
        """End what is left of a request."""
        left = list(self._open.get(request_id, {}).values())
        self._counters.num_aborted += len(left)
        return [self._end(sequence, FinishReason.ABORT) for sequence in left]

    def fail(self, sequence: Sequence, error: Exception) -> Event:
        """End it with this error; what is not ours to show is told as a failure of the engine."""
        ours = isinstance(error, LorinerError)
        return msgspec.structs.replace(
            self._end(sequence, FinishReason.ERROR),
            error=str(error) if ours else "The engine failed.",
            error_kind=type(error).__name__ if ours else "EngineFailedError",
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
    ) -> Event:
        """Free everything the sequence holds, and make its last event."""
        sequence.done, sequence.reads_prompt = True, False
        detokenizer = self._text.pop(sequence)
        lost = reason in (FinishReason.ABORT, FinishReason.ERROR)
        text += detokenizer.flush() if flush and not lost else ""
        self._release(sequence)
        choices = self._open[sequence.request.request_id]
        del choices[sequence.index]
        if not choices:
            del self._open[sequence.request.request_id]
        return msgspec.structs.replace(
            self._event(sequence, choice, text),
            finish_reason=reason,
            stop_reason=stop_reason,
            embedding=embedding,
        )

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

    def _prompt_logprobs(self, sequence: Sequence) -> tuple[TokenLogprob, ...]:
        """All of them, once, with the first choice's first token, or its end if it wants none."""
        reading = sequence.reading
        if not isinstance(reading, PromptLogprobs) or sequence.index:
            return ()
        if reading.num_read < sequence.num_prompt:
            return ()
        sequence.reading = None
        return reading.entries(sequence.token_ids[0])
