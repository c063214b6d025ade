"""Events of one request -> the chunks or the whole body of an answer; chat's format.

Pure: no I/O, no waiting. A format lives for one request and keeps only what the next chunk needs.
Invariant: each choice gets exactly one finish_reason, and what is streamed adds up to the whole
body.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import UNSET, UnsetType

from loriner.api import logprob_shapes, shapes
from loriner.api.pieces import Piece
from loriner.api.prompts import Prompt
from loriner.api.spoken import delta_of, message_of
from loriner.api.voice import Said
from loriner.core import Event, TokenLogprob


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk of one answer repeats, and what the caller asked to see."""

    answer_id: str
    created: int
    model: str
    fingerprint: str
    origin: shapes.Origin
    logprobs: bool
    token_ids: bool
    tokens_by_id: bool = False  # in the logprobs, instead of their texts
    prompt_top: int | None = None  # alternatives to each token of the prompt
    echoed_top: int | None = None  # the same, among the logprobs of an echoed prompt
    prompt_logprobs: Sequence[TokenLogprob] = ()  # of a chat's prompt


@dataclass(slots=True)
class Gathered:
    """One choice of a whole body, as its events arrive."""

    texts: list[str] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob] = ()  # of a prompt's first choice
    finish_reason: str = "stop"
    stop_reason: str | int | None = None

    def add(self, said: Said) -> None:
        event = said.event
        self.texts.append(event.text)
        self.pieces.extend(said.pieces)
        self.token_ids.extend(event.token_ids)
        self.logprobs.extend(event.logprobs)
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        if said.finish_reason is not None:
            self.finish_reason, self.stop_reason = said.finish_reason, event.stop_reason


class Format(Protocol):
    """Chat or text: the two ways to write the same events."""

    def opening(self, num_choices: int) -> list[shapes.Answer]:
        """Chunks sent before the first event's own."""

    def chunk(self, said: Said) -> shapes.Answer | None:
        """The chunk for one event; None when it has nothing to show yet."""

    def closing(self, usage: shapes.Usage) -> shapes.Answer:
        """The chunk after the last event, when the caller asked for usage."""

    def whole(self, choices: Sequence[Gathered], usage: shapes.Usage) -> shapes.Answer:
        """The body of an answer that was not streamed."""


class ChatFormat:
    """POST /v1/chat/completions."""

    def __init__(self, head: Head, prompt: Prompt) -> None:
        self._head = head
        self._prompt = prompt

    def opening(self, num_choices: int) -> list[shapes.Answer]:
        chunks = [
            self._answer(
                [shapes.ChatDeltaChoice(i, shapes.Delta(role="assistant", content=""))], True
            )
            for i in range(num_choices)
        ]
        chunks[0].loriner = self._head.origin
        if self._head.token_ids:
            chunks[0].prompt_token_ids = self._prompt.ids
        chunks[0].prompt_logprobs = of_prompt(self._head, self._head.prompt_logprobs)
        echoed = shapes.Delta(content=self._prompt.text)
        for i in range(num_choices if self._prompt.text else 0):
            chunks.append(self._answer([shapes.ChatDeltaChoice(i, echoed)], True))
        return chunks

    def chunk(self, said: Said) -> shapes.Answer | None:
        event, delta, finish = said.event, delta_of(said.pieces), said.finish_reason
        if not said.pieces and finish is None:
            if not shows_tokens(self._head, event):
                return None
            delta.content = ""
        choice = shapes.ChatDeltaChoice(
            index=said.index,
            delta=delta,
            logprobs=self._logprobs(event.logprobs),
            finish_reason=finish,
            stop_reason=UNSET if finish is None else event.stop_reason,
            token_ids=ids_of(self._head, event.token_ids),
        )
        return self._answer([choice], True)

    def closing(self, usage: shapes.Usage) -> shapes.Answer:
        answer = self._answer([], True)
        answer.usage, answer.loriner = usage, self._head.origin
        return answer

    def whole(self, choices: Sequence[Gathered], usage: shapes.Usage) -> shapes.Answer:
        answer = self._answer(
            [
                shapes.ChatChoice(
                    index=i,
                    message=message_of(choice.pieces, self._prompt.text),
                    logprobs=self._logprobs(choice.logprobs),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                    token_ids=ids_of(self._head, choice.token_ids),
                )
                for i, choice in enumerate(choices)
            ],
            False,
        )
        answer.usage, answer.loriner = usage, self._head.origin
        answer.prompt_token_ids = ids_of(self._head, self._prompt.ids)
        answer.prompt_logprobs = of_prompt(self._head, self._head.prompt_logprobs)
        return answer

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> shapes.ChatLogprobs | None:
        if not self._head.logprobs:
            return None
        return shapes.ChatLogprobs(
            [logprob_shapes.token_logprob(named(self._head, entry)) for entry in logprobs]
        )

    def _answer(self, choices: list[object], is_chunk: bool) -> shapes.Answer:
        return answer_of(self._head, "chat.completion" + ".chunk" * is_chunk, choices)


def answer_of(head: Head, kind: str, choices: list[object]) -> shapes.Answer:
    return shapes.Answer(head.answer_id, kind, head.created, head.model, head.fingerprint, choices)


def shows_tokens(head: Head, event: Event) -> bool:
    return bool(event.token_ids) and (head.logprobs or head.token_ids)


def named(head: Head, entry: TokenLogprob) -> TokenLogprob:
    """As the caller asked for tokens to be named."""
    return logprob_shapes.by_ids(entry) if head.tokens_by_id else entry


def ids_of(head: Head, ids: Sequence[int]) -> list[int] | UnsetType:
    return list(ids) if head.token_ids else UNSET


def of_prompt(head: Head, told: Sequence[TokenLogprob]) -> shapes.PromptLogprobs | UnsetType:
    """What the caller asked to see of the prompt's tokens."""
    return UNSET if head.prompt_top is None else logprob_shapes.of_prompt(told, head.prompt_top)
