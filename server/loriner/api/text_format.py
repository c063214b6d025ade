"""Events of one request -> the chunks or the whole body of a text completion.

Pure, as `formats`. Keeps each choice's offset in its text, and what is still to be told of its
prompt. Invariant: an echoed prompt stands before its answer, its log-probabilities too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from msgspec import UNSET

from loriner.api import shapes
from loriner.api.formats import (
    Gathered,
    Head,
    answer_of,
    ids_of,
    named,
    of_prompt,
    shows_tokens,
)
from loriner.api.logprob_shapes import by_text, finite
from loriner.api.prompts import Prompt
from loriner.api.voice import Said
from loriner.core import Event, TokenLogprob


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
                choice.prompt_token_ids = ids_of(self._head, prompt.ids)
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
        choice.prompt_token_ids = ids_of(self._head, prompt.ids)
        choice.prompt_logprobs = of_prompt(self._head, told)
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
            token_ids=ids_of(self._head, event.token_ids),
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
            token_ids=ids_of(self._head, choice.token_ids),
            prompt_token_ids=ids_of(self._head, prompt.ids),
            prompt_logprobs=of_prompt(self._head, told),
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
            shown = named(self._head, entry)
            answer.tokens.append(shown.token)
            known = not math.isnan(entry.logprob)
            answer.token_logprobs.append(finite(entry.logprob) if known else None)
            answer.top_logprobs.append(by_text(shown) if known else None)
            answer.text_offset.append(max(offset, 0))
            offset += len(entry.token)
        self._offsets[index] = offset
        return answer

    def _answer(self, choices: list[object]) -> shapes.Answer:
        return answer_of(self._head, "text_completion", choices)


def _is_worth_sending(head: Head, event: Event) -> bool:
    """Half a character is a token without text: nothing to show unless tokens were asked for."""
    return bool(event.text) or event.finish_reason is not None or shows_tokens(head, event)
