"""Greedy answers by the trainer's own weights: batches, padding, segments, ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loriner.train.answers import Question, _visible, answer
from loriner.train.base import Base, open_base
from loriner.train.lora import Lora
from loriner.train.settings import ALL_LINEAR, RunConfig
from tests.tiny import IM_END

PROMPTS = ([5, 6, 7], [9] * 20, [40, 41, 42, 43, 44, 45, 46], [1])


@pytest.fixture(scope="module")
def base(tiny: Path) -> Base:
    return open_base(RunConfig(base=tiny, device="cpu"))


def make_lora(base: Base, seed: int) -> Lora:
    lora = Lora(base.config.linears_named(ALL_LINEAR), rank=4, scaling=2.0, seed=seed)
    for _, b in lora.weights.values():
        b.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return lora


def test_a_question_is_answered_in_a_batch_as_it_is_alone(base: Base) -> None:
    """Of other lengths, by other adapters, however many rows there are at a time."""
    loras = (None, make_lora(base, 1), make_lora(base, 2))
    asked = [Question(prompt, lora) for prompt in PROMPTS for lora in loras]
    together = answer(base, asked, 6, ignore_eos=True)
    threes = answer(base, asked, 6, ignore_eos=True, max_rows=3)

    for question, *batched in zip(asked, together, threes, strict=True):
        (alone,) = answer(base, [question], 6, ignore_eos=True)
        for found in batched:
            assert found.token_ids == alone.token_ids
            for top, expected in zip(found.top, alone.top, strict=True):
                assert [p for _, p in top] == pytest.approx([p for _, p in expected], abs=1e-3)


def test_an_answer_ends_with_the_end_of_sequence_and_others_go_on(base: Base) -> None:
    head = base.head.dense()
    kept = head[IM_END].clone()
    try:
        head[IM_END] = head[3] * 2  # certain wherever token 3 was likely
        answers = answer(base, [Question(prompt, None) for prompt in PROMPTS], 12)
    finally:
        head[IM_END] = kept
    ends = [found.token_ids.index(IM_END) for found in answers if IM_END in found.token_ids]

    assert ends and len(set(map(len, (a.token_ids for a in answers)))) > 1
    for found in answers:
        assert found.token_ids[-1] == IM_END or len(found.token_ids) == 12
        assert IM_END not in found.token_ids[:-1]
        assert len(found.top) == len(found.token_ids)


def test_padding_is_seen_by_itself_alone() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    padded, whole = _visible(mask, 4)[:, 0].int().tolist()

    assert padded == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert whole == torch.ones(4, 4).tril().int().tolist()
    assert _visible(mask, 1)[:, 0].int().tolist() == [[[0, 0, 1, 1]], [[1, 1, 1, 1]]]
