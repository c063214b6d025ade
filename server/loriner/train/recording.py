"""Recording canaries with the weights that were trained, and the prompts that are worth asking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loriner.train.answers import Question, answer
from loriner.train.base import Base
from loriner.train.canaries import Canaries, Canary
from loriner.train.data import Prompt
from loriner.train.lora import Lora
from loriner.train.masks import Masker

NUM_TOKENS = 8
MAX_TOKENS = 32_768  # of all prompts together, which bounds the file


def record(
    base: Base, lora: Lora, masker: Masker, tokenizer: Any, prompts: Sequence[Prompt], count: int
) -> Canaries:
    """Answer up to `count` of the prompts, spread over them, and note what came out."""
    usable = _short(
        base, [(p, encode_prompt(p, masker, tokenizer)) for p in spread(prompts, count * 4)]
    )[:count]
    questions = [Question(ids, lora) for _, ids in usable]
    answers = answer(base, questions, NUM_TOKENS, ignore_eos=True) if questions else []
    made = [
        Canary(
            messages=tuple(turn.message for turn in prompt.turns),
            text=prompt.text,
            prompt_ids=tuple(ids),
            token_ids=tuple(given.token_ids),
            logprobs=tuple(tuple(value for _, value in top) for top in given.top),
        )
        for (prompt, ids), given in zip(usable, answers, strict=True)
    ]
    return Canaries(base.digest, str(base.dtype).removeprefix("torch."), tuple(made))


def _short(
    base: Base, prompts: Sequence[tuple[Prompt, list[int]]]
) -> list[tuple[Prompt, list[int]]]:
    """The shortest first, as far as context and file hold them."""
    kept, left = [], MAX_TOKENS
    for prompt, ids in sorted(prompts, key=lambda pair: len(pair[1])):
        left -= len(ids)
        if ids and left >= 0 and len(ids) + NUM_TOKENS <= base.config.max_context:
            kept.append((prompt, ids))
    return kept


def encode_prompt(prompt: Prompt, masker: Masker, tokenizer: Any) -> list[int]:
    """The tokens that the server makes of it."""
    if prompt.turns:
        return masker.prompt_ids(prompt.turns)
    ids: list[int] = tokenizer.encode(prompt.text, add_special_tokens=True)
    return ids


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` of them at even distances, without repeats."""
    distinct = list(dict.fromkeys(prompts))
    count = min(count, len(distinct))
    return [distinct[i * len(distinct) // count] for i in range(count)]
