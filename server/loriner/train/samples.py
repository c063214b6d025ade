"""Sample answers: what base and adapter say to the same held-out questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loriner.train.answers import Question, answer
from loriner.train.base import Base
from loriner.train.data import Prompt
from loriner.train.job import Job
from loriner.train.masks import Masker
from loriner.train.recording import encode_prompt, spread


@dataclass(frozen=True, slots=True)
class Sample:
    """One question, the answer in the data, and the two that were given."""

    question: str
    wanted: str
    base: str
    adapter: str


def take_samples(job: Job, base: Base, masker: Masker, tokenizer: Any) -> list[Sample]:
    """Base and adapter answer in one batch, greedily, to their end-of-sequence token."""
    prompts = spread((job.held or job.data).prompts, job.settings.samples)
    if not prompts:
        return []
    ids = [encode_prompt(prompt, masker, tokenizer) for prompt in prompts]
    ids = [prompt[-job.settings.max_length :] for prompt in ids]
    asked = [Question(prompt, lora) for lora in (None, job.lora) for prompt in ids]
    answers = answer(base, asked, job.settings.sample_tokens)
    texts = [tokenizer.decode(a.token_ids, skip_special_tokens=True).strip() for a in answers]
    return _paired(prompts, texts)


def _paired(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Sample]:
    count = len(prompts)
    return [
        Sample(prompt.turns[-1].content if prompt.turns else prompt.text, prompt.answer, *pair)
        for prompt, *pair in zip(prompts, texts[:count], texts[count:], strict=True)
    ]
