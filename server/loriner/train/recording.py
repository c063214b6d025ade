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
MAX_PROMPT_TOKENS = 256


def record(
    base: Base, lora: Lora, masker: Masker, tokenizer: Any, prompts: Sequence[Prompt], count: int
) -> Canaries:
    """Answer up to `count` of the prompts, spread over them, and note what came out."""
    usable = [(p, encode_prompt(p, masker, tokenizer)) for p in spread(prompts, count)]
    usable = [(p, ids) for p, ids in usable if 0 < len(ids) <= MAX_PROMPT_TOKENS]
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
