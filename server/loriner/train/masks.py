"""Examples -> documents: token ids, and for each token whether it is learnt.

A chat is rendered twice for each assistant turn, before and after it; what the second adds, up to
its end-of-sequence token, is learnt. The parts are tokenised apart, so a prompt has exactly the
tokens that the server gives it. Invariant: a document has a learnt token, and the first is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, Protocol

from loriner.train.rows import Chat, Example, Pair, RowError, Turn


class Tokenizer(Protocol):
    """What is used of transformers' tokenizers."""

    eos_token_id: int | None
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> Any: ...


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that see each other and nothing else."""

    token_ids: tuple[int, ...]
    is_learnt: tuple[bool, ...]

    @property
    def num_learnt(self) -> int:
        return sum(self.is_learnt)


Piece = tuple[str, bool]  # text, whether it is learnt


class Masker:
    """Makes documents with one base's tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> None:
        """`eos_ids`: the ids at which the server stops; the first is appended where none is."""
        self._tokenizer = tokenizer
        self._eos_ids = tuple(eos_ids)

    def documents(self, example: Example) -> list[Document]:
        """One, or more when the template writes earlier turns anew. Raises RowError."""
        if isinstance(example, Chat):
            return [self._document(pieces) for pieces in self._render(example.turns)]
        learnt = example.completion if isinstance(example, Pair) else example.text
        prompt = example.prompt if isinstance(example, Pair) else ""
        given = self._tokenizer.encode(prompt, add_special_tokens=True)
        ids = self._tokenizer.encode(learnt, add_special_tokens=False)
        return [_document([(given, False), (self._ended(ids, []), True)])]

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """What the server makes of these messages before it answers."""
        return self._tokenizer.encode(self._text(turns, True), add_special_tokens=False)

    def _render(self, turns: tuple[Turn, ...]) -> list[list[Piece]]:
        """Pieces of text for each document."""
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if not any(turns[i].is_learnt for i in answers):
            raise RowError("no assistant turn to learn from")
        done: list[list[Piece]] = []
        pieces: list[Piece] = []
        for i in answers:
            before, after = self._text(turns[:i], True), self._text(turns[: i + 1], False)
            if not after.startswith(before):
                raise RowError("the chat template does not begin an answer as it begins a prompt")
            so_far = "".join(text for text, _ in pieces)
            if not before.startswith(so_far):
                done.append(pieces)
                pieces, so_far = [], ""
            pieces.append((before[len(so_far) :], False))
            pieces.append((after[len(before) :], turns[i].is_learnt))
        return [p for p in [*done, pieces] if any(is_learnt for _, is_learnt in p)]

    def _text(self, turns: Sequence[Turn], is_prompt: bool) -> str:
        from jinja2.exceptions import TemplateError

        if not self._tokenizer.chat_template:
            raise RowError("the base has no chat template; use prompt and completion, or text")
        messages = [turn.message for turn in turns]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, add_generation_prompt=is_prompt, tokenize=False
                )
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise RowError(f"the chat template refused: {error}") from None

    def _document(self, pieces: list[Piece]) -> Document:
        parts: list[tuple[list[int], bool]] = []
        for text, is_learnt in pieces:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if is_learnt:
                rest: list[int] = []
                parts.append((self._ended(ids, rest), True))
                ids = rest
            parts.append((ids, False))
        return _document(parts)

    def _ended(self, ids: list[int], rest: list[int]) -> list[int]:
        """`ids` up to the last end-of-sequence token; what follows it goes to `rest`."""
        ends = [i for i, token in enumerate(ids) if token in self._eos_ids]
        if not ends:
            return [*ids, *self._eos_ids[:1]]
        rest += ids[ends[-1] + 1 :]
        return ids[: ends[-1] + 1]


def truncated(document: Document, max_length: int) -> Document:
    """The first `max_length` tokens. Raises RowError when none of them is learnt."""
    if len(document.token_ids) <= max_length:
        return document
    short = Document(document.token_ids[:max_length], document.is_learnt[:max_length])
    if not short.num_learnt:
        raise RowError(f"nothing to learn within max_length {max_length}")
    return short


def _document(parts: list[tuple[list[int], bool]]) -> Document:
    ids = tuple(chain.from_iterable(ids for ids, _ in parts))
    flags = [*chain.from_iterable(repeat(flag, len(ids)) for ids, flag in parts)]
    flags[:1] = [False] * len(flags[:1])
    if not any(flags):
        raise RowError("nothing to learn: the answer is empty")
    return Document(ids, tuple(flags))
