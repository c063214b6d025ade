"""Prompts in, texts of greedy answers out, by the trainer's own weights; for gates and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loriner.train.answers import MAX_ROWS, Question, answer
from loriner.train.base import Base
from loriner.train.data import Prompt
from loriner.train.lora import Lora
from loriner.train.masks import Masker
from loriner.train.recording import encode_prompt

SPARE_TOKENS = 8  # beyond the longest answer that is wanted
MAX_ANSWER_TOKENS = 512


def ask(
    base: Base,
    lora: Lora | None,
    prompts: Sequence[Prompt],
    masker: Masker,
    tokenizer: Any,
    *,
    max_rows: int = MAX_ROWS,
) -> list[str]:
    """The answers, `max_rows` at a time; each may be a little longer than the longest wanted."""
    wanted = [tokenizer.encode(p.answer, add_special_tokens=False) for p in prompts]
    length = min(SPARE_TOKENS + max(map(len, wanted)), MAX_ANSWER_TOKENS)
    asked = [Question(encode_prompt(p, masker, tokenizer), lora) for p in prompts]
    answers = answer(base, asked, length, max_rows=max_rows)
    return [tokenizer.decode(a.token_ids, skip_special_tokens=True) for a in answers]
