"""Tokens from logits: parameters, determinism, log-probabilities, broken rows."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from loriner.core import Sequence
from loriner.engine import sampler
from loriner.engine.sampler import sample, uniform
from loriner.engine.step_input import Draw
from tests.fakes import make_sequence

EOS = (0,)


def pick(logits: list[float] | Tensor, output: list[int] = [], seed: int = 7, **params: Any) -> int:  # noqa: B006
    sequence = make_sequence((1, 2), **params)
    sequence.seed = seed
    for token in output:
        sequence.append(token)
    row = logits if isinstance(logits, Tensor) else torch.tensor(logits)
    token_id = sample(row[None], draws(sequence), EOS)[0].token_id
    assert token_id is not None
    return token_id


def draws(*sequences: Sequence) -> list[Draw]:
    return [Draw.of(sequence, sequence.num_known) for sequence in sequences]


def draw_many(logits: list[float], count: int = 2000, **params: Any) -> Counter[int]:
    return Counter(pick(logits, seed=s * 7919, temperature=1.0, **params) for s in range(count))


def test_greedy_takes_the_largest() -> None:
    assert pick([0.0, 1.0, 3.0, 2.0]) == 2


def test_draws_follow_the_probabilities() -> None:
    probs = [0.5, 0.25, 0.125, 0.125]
    counts = draw_many([math.log(p) for p in probs])
    for token, p in enumerate(probs):
        assert abs(counts[token] / 2000 - p) < 0.04


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.6}, {1, 2}),
        ({"top_p": 0.01}, {1}),
        ({"min_p": 0.5}, {1, 2}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.9}, {1}),
    ],
)
def test_filters_keep_only_the_likely(params: dict[str, Any], allowed: set[int]) -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.3, 0.2)]
    assert set(draw_many(logits, 300, **params)) == allowed


@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"top_k": 1500},
        {"top_k": 50},
        {"min_p": 0.1},
        {"min_p": 1e-9},
    ],
)
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_looking_at_the_likely_first_changes_nothing(
    params: dict[str, Any], spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5000) * spread
    some = [pick(logits, seed=seed, temperature=1.0, **params) for seed in range(40)]
    monkeypatch.setattr(sampler, "FIRST", 5000)
    assert some == [pick(logits, seed=seed, temperature=1.0, **params) for seed in range(40)]


@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 0.3}])
def test_of_equals_the_lowest_ids_are_kept(params: dict[str, Any]) -> None:
    logits = [0.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    assert set(draw_many(logits, 200, **params)) == {1, 2}


@pytest.mark.parametrize("temperature", [1e-300, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert pick([0.0, 1.0, 3.0, 2.0], temperature=temperature) == 2


def test_a_seed_draws_the_same_whatever_runs_beside_it() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    sequences = [make_sequence(temperature=1.0, request_id=str(i)) for i in range(3)]
    for seed, sequence in enumerate(sequences):
        sequence.seed = seed
    together = [s.token_id for s in sample(logits, draws(*sequences), EOS)]
    alone = [sample(logits[i][None], draws(sequences[i]), EOS)[0].token_id for i in range(3)]
    assert together == alone


def test_noise_differs_by_position_and_seed() -> None:
    values = {uniform(seed, position) for seed in range(50) for position in range(50)}
    assert len(values) == 2500 and all(0 <= v < 1 for v in values)
    assert abs(sum(values) / 2500 - 0.5) < 0.02


def test_repetition_penalty_counts_prompt_and_output() -> None:
    assert pick([0.0, 2.0, 1.9, 1.5], repetition_penalty=1.5) == 3
    assert pick([0.0, -1.0, -1.1, -1.2], output=[0], repetition_penalty=3.0) == 0
    assert pick([-0.1, -3.0, -1.1, -0.2], output=[0], repetition_penalty=3.0) == 3


def test_frequency_and_presence_count_the_output_only() -> None:
    assert pick([0.0, 2.0, 1.9, 0.0], frequency_penalty=2.0) == 1
    assert pick([0.0, 0.0, 2.0, 1.0], output=[2], frequency_penalty=0.6) == 2
    assert pick([0.0, 0.0, 2.0, 1.0], output=[2, 2], frequency_penalty=0.6) == 3
    assert pick([0.0, 0.0, 2.0, 1.0], output=[2, 2], presence_penalty=0.6) == 2


def test_logit_bias_moves_the_choice() -> None:
    assert pick([0.0, 1.0, 3.0, 2.0], logit_bias=((2, -100.0),)) == 3


def test_min_tokens_bars_the_end() -> None:
    params = {"min_tokens": 2, "stop_token_ids": (3,)}
    assert pick([9.0, 1.0, 3.0, 8.0], **params) == 2
    assert pick([9.0, 1.0, 3.0, 8.0], output=[2, 2], **params) == 0


def test_logprobs_are_the_models_own() -> None:
    sequence = make_sequence(logprobs=2, logit_bias=((3, 100.0),))
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    chosen = sample(logits, draws(sequence), EOS)[0]
    expected = torch.log_softmax(logits[0], dim=-1)
    assert chosen.token_id == 3 and chosen.logprob == pytest.approx(float(expected[3]))
    assert [i for i, _ in chosen.top] == [2, 3]


def test_a_broken_row_fails_alone() -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = torch.nan
    sequences = [make_sequence(request_id=str(i)) for i in range(3)]
    assert [s.token_id is None for s in sample(logits, draws(*sequences), EOS)] == [
        False,
        True,
        False,
    ]


def test_logits_are_not_changed() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    before = logits.clone()
    sample(logits, draws(make_sequence(logit_bias=((1, 5.0),), repetition_penalty=2.0)), EOS)
    assert torch.equal(logits, before)
