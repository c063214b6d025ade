"""Events of one request -> the chunks or the whole body of a chat or a text completion.

Pure: no I/O, no waiting. A format lives for one request and keeps only what the next chunk needs
(text offsets). Invariant: each choice gets exactly one finish_reason, and what is streamed adds up
to the whole body.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from msgspec import UNSET, UnsetType

from loriner.api import shapes
from loriner.api.pieces import Piece
from loriner.api.prompts import Prompt
from loriner.api.spoken import delta_of, message_of
from loriner.api.voice import Said
from loriner.core import Event, TokenLogprob

_FLOOR = -9999.0  # OpenAI's stand-in for minus infinity, which JSON lacks


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
        chunks[0].prompt_logprobs = _of_prompt(self._head, self._head.prompt_logprobs)
        return chunks

    def chunk(self, said: Said) -> shapes.Answer | None:
        event, delta, finish = said.event, delta_of(said.pieces), said.finish_reason
        if not said.pieces and finish is None:
            if not _shows_tokens(self._head, event):
                return None
            delta.content = ""
        choice = shapes.ChatDeltaChoice(
            index=said.index,
            delta=delta,
            logprobs=self._logprobs(event.logprobs),
            finish_reason=finish,
            stop_reason=UNSET if finish is None else event.stop_reason,
            token_ids=_ids(self._head, event.token_ids),
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
                    message=message_of(choice.pieces),
                    logprobs=self._logprobs(choice.logprobs),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                    token_ids=_ids(self._head, choice.token_ids),
                )
                for i, choice in enumerate(choices)
            ],
            False,
        )
        answer.usage, answer.loriner = usage, self._head.origin
        answer.prompt_token_ids = _ids(self._head, self._prompt.ids)
        answer.prompt_logprobs = _of_prompt(self._head, self._head.prompt_logprobs)
        return answer

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> shapes.ChatLogprobs | None:
        if not self._head.logprobs:
            return None
        return shapes.ChatLogprobs([_token_logprob(entry) for entry in logprobs])

    def _answer(self, choices: list[object], is_chunk: bool) -> shapes.Answer:
        return _answer(self._head, "chat.completion" + ".chunk" * is_chunk, choices)


class TextFormat:
    """POST /v1/completions: choice `i` of prompt `p` has index `p * n + i`."""

    def __init__(self, head: Head, prompts: Sequence[Prompt], n: int) -> None:
        self._head = head
        self._prompts = prompts
        self._n = n
        self._offsets: dict[int, int] = {}
        self._is_first = True
        self._begun: set[int] = set()  # choices whose prompts were told of
        self._told: dict[int, Sequence[TokenLogprob]] = {}  # prompt -> what its tokens were

    def opening(self, num_choices: int) -> list[shapes.Answer]:
        """Not where log-probabilities come with the prompts: those are here with the first event of
        each."""
        if self._scores:
            return []
        chunks = []
        for index in range(num_choices):
            prompt = self._prompts[index // self._n]
            if prompt.text or self._head.token_ids:
                choice = shapes.TextChoice(index, prompt.text)
                choice.prompt_token_ids = _ids(self._head, prompt.ids)
                chunks.append(self._chunk(choice))
        return chunks

    @property
    def _scores(self) -> bool:
        return self._head.prompt_top is not None or self._head.echoed_top is not None

    def chunk(self, said: Said) -> shapes.Answer | None:
        index, event = said.index, said.event
        if self._scores and index not in self._begun:
            return self._chunk(self._begin(index, event))
        if not _is_worth_sending(self._head, event):
            return None
        return self._chunk(self._delta(index, event))

    def _begin(self, index: int, event: Event) -> shapes.TextChoice:
        """A choice's first event, with what is told of its prompt. The first choice of a prompt
        brings that, and begins before the others."""
        self._begun.add(index)
        which = index // self._n
        if event.prompt_logprobs:
            self._told[which] = event.prompt_logprobs
        prompt, told = self._prompts[which], self._told[which]
        choice = self._delta(index, event, self._echoed(index, told))
        choice.text = prompt.text + choice.text
        choice.prompt_token_ids = _ids(self._head, prompt.ids)
        choice.prompt_logprobs = _of_prompt(self._head, told)
        return choice

    def _delta(
        self, index: int, event: Event, echoed: Sequence[TokenLogprob] = ()
    ) -> shapes.TextChoice:
        finish = event.finish_reason
        return shapes.TextChoice(
            index=index,
            text=event.text,
            logprobs=self._logprobs(index, (*echoed, *event.logprobs)),
            finish_reason=None if finish is None else finish.value,
            stop_reason=UNSET if finish is None else event.stop_reason,
            token_ids=_ids(self._head, event.token_ids),
        )

    def _chunk(self, choice: shapes.TextChoice) -> shapes.Answer:
        answer = self._answer([choice])
        if self._is_first:
            self._is_first, answer.loriner = False, self._head.origin
        return answer

    def closing(self, usage: shapes.Usage) -> shapes.Answer:
        answer = self._answer([])
        answer.usage, answer.loriner = usage, self._head.origin
        return answer

    def whole(self, choices: Sequence[Gathered], usage: shapes.Usage) -> shapes.Answer:
        told = [choices[i - i % self._n].prompt_logprobs for i in range(len(choices))]
        answer = self._answer([self._choice(i, one, told[i]) for i, one in enumerate(choices)])
        answer.usage, answer.loriner = usage, self._head.origin
        return answer

    def _choice(
        self, index: int, choice: Gathered, told: Sequence[TokenLogprob]
    ) -> shapes.TextChoice:
        prompt = self._prompts[index // self._n]
        return shapes.TextChoice(
            index=index,
            text=prompt.text + "".join(choice.texts),
            logprobs=self._logprobs(index, (*self._echoed(index, told), *choice.logprobs)),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            token_ids=_ids(self._head, choice.token_ids),
            prompt_token_ids=_ids(self._head, prompt.ids),
            prompt_logprobs=_of_prompt(self._head, told),
        )

    def _echoed(self, index: int, told: Sequence[TokenLogprob]) -> Sequence[TokenLogprob]:
        """Of the prompt's tokens, when they stand in front of the answer's. A special token that
        was put before the caller's text has no place in it."""
        top = self._head.echoed_top
        if top is None:
            return ()
        size = len(self._prompts[index // self._n].text)
        self._offsets[index] = size - sum(len(one.token) for one in told)
        return [replace(one, top=one.top[:top]) for one in told]

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> shapes.TextLogprobs | None:
        if not self._head.logprobs:
            return None
        answer = shapes.TextLogprobs([], [], [], [])
        offset = self._offsets.get(index, 0)
        for entry in logprobs:
            answer.tokens.append(entry.token)
            known = not math.isnan(entry.logprob)
            answer.token_logprobs.append(_finite(entry.logprob) if known else None)
            answer.top_logprobs.append(_by_text(entry) if known else None)
            answer.text_offset.append(max(offset, 0))
            offset += len(entry.token)
        self._offsets[index] = offset
        return answer

    def _answer(self, choices: list[object]) -> shapes.Answer:
        return _answer(self._head, "text_completion", choices)


def _answer(head: Head, kind: str, choices: list[object]) -> shapes.Answer:
    return shapes.Answer(head.answer_id, kind, head.created, head.model, head.fingerprint, choices)


def _is_worth_sending(head: Head, event: Event) -> bool:
    """Half a character is a token without text: nothing to show unless tokens were asked for."""
    return bool(event.text) or event.finish_reason is not None or _shows_tokens(head, event)


def _shows_tokens(head: Head, event: Event) -> bool:
    return bool(event.token_ids) and (head.logprobs or head.token_ids)


def _ids(head: Head, ids: Sequence[int]) -> list[int] | UnsetType:
    return list(ids) if head.token_ids else UNSET


def _of_prompt(head: Head, told: Sequence[TokenLogprob]) -> shapes.PromptLogprobs | UnsetType:
    """One entry for each token, the likeliest after it; null for the first."""
    if head.prompt_top is None:
        return UNSET
    return [
        None
        if math.isnan(entry.logprob)
        else {
            str(one.token_id): shapes.PromptLogprob(_finite(one.logprob), one.rank, one.token)
            for one in (entry, *entry.top[: head.prompt_top])
        }
        for entry in told
    ]


def _token_logprob(entry: TokenLogprob) -> shapes.TokenLogprob:
    top = [shapes.TopLogprob(t.token, _finite(t.logprob), _bytes(t.token)) for t in entry.top]
    return shapes.TokenLogprob(entry.token, _finite(entry.logprob), _bytes(entry.token), top)


def _by_text(entry: TokenLogprob) -> dict[str, float]:
    """Text -> log-probability; of two tokens with one text the likelier stands."""
    best: dict[str, float] = {}
    for candidate in (*entry.top, entry):
        logprob = _finite(candidate.logprob)
        best[candidate.token] = max(logprob, best.get(candidate.token, logprob))
    return best


def _bytes(token: str) -> list[int] | None:
    """None for a piece of a character: its bytes are not those of the replacement sign."""
    return None if "�" in token else list(token.encode())


def _finite(logprob: float) -> float:
    return max(logprob, _FLOOR) if logprob == logprob else _FLOOR
