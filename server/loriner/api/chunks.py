"""One chat or text completion as bytes: its chunks as events, or its whole body.

Joins a `Format` with what the caller asked to see. Knows no sending.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loriner.api import shapes, sse
from loriner.api.formats import Format, Gathered, Head
from loriner.api.running import Run
from loriner.api.schema_sampling import SamplingBody
from loriner.api.status import error_body
from loriner.api.voice import Said


class ChunkWriter:
    """Of one run."""

    def __init__(
        self, run: Run, origin: shapes.Origin, body: SamplingBody, make: Callable[[Head], Format]
    ) -> None:
        self._run = run
        head = Head(
            answer_id=run.answer_id,
            created=run.created,
            model=run.model,
            fingerprint=f"fp_{origin.base_digest[:12]}",
            origin=origin,
            logprobs=run.job.sampling.logprobs is not None,
            token_ids=body.return_token_ids,
            tokens_by_id=body.return_tokens_as_token_ids,
            prompt_top=body.prompt_top(),
            echoed_top=body.echoed_logprobs(),
            prompt_logprobs=run.prompt_logprobs,
        )
        self._format = make(head)
        options = body.stream_options
        self._has_usage = bool(options and options.include_usage)
        self._usage_everywhere = bool(options and options.continuous_usage_stats)

    def opening(self) -> bytes:
        return b"".join(map(self._encode, self._format.opening(self._run.job.num_choices)))

    def part(self, said: Said) -> bytes:
        chunk = self._format.chunk(said)
        return b"" if chunk is None else self._encode(chunk)

    def closing(self) -> bytes:
        last = sse.encode(self._format.closing(usage(self._run))) if self._has_usage else b""
        return last + sse.DONE

    def failure(self, error: Exception) -> bytes:
        return sse.encode(error_body(error, self._run.job.request_id))

    def whole(self, choices: Sequence[Gathered]) -> shapes.Answer:
        return self._format.whole(choices, usage(self._run))

    def _encode(self, chunk: shapes.Answer) -> bytes:
        if self._has_usage:
            chunk.usage = usage(self._run) if self._usage_everywhere else None
        return sse.encode(chunk)


def usage(run: Run) -> shapes.Usage:
    """What the run has used so far."""
    prompt, output = run.prompt_tokens, run.output_tokens
    return shapes.Usage(
        prompt_tokens=prompt,
        completion_tokens=output,
        total_tokens=prompt + output,
        prompt_tokens_details=shapes.PromptTokens(run.cached_tokens),
        completion_tokens_details=shapes.CompletionTokens(run.reasoning_tokens),
    )
