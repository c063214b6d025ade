"""Scores of answers and their intervals."""

from __future__ import annotations

import pytest

from loriner.errors import ConfigError
from loriner.train.scoring import (
    exact,
    last_number,
    mean_interval,
    same_json,
    same_number,
    scorer,
    wilson,
)


def test_exact_forgives_white_space_around_alone() -> None:
    assert exact(" card_arrival\n", "card_arrival")
    assert not exact("Card_arrival", "card_arrival")


def test_json_is_compared_as_values() -> None:
    assert same_json('{"b": [1, 2], "a": 1.0}', '{"a": 1, "b": [1, 2]}')
    assert not same_json('{"a": 1', '{"a": 1}')
    assert not same_json('{"a": 2}', '{"a": 1}')
    assert same_json(" yes ", "yes")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", 72.0),
        ("It makes 1,234.50 in all.", 1234.5),
        ("3 - 4 = -1", -1.0),
        ("none", None),
        ("12 apples #### ", 12.0),
    ],
)
def test_the_last_number_counts(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numbers_need_a_number_in_both() -> None:
    assert same_number("so 72.", "#### 72")
    assert not same_number("so", "none")


def test_intervals_are_those_of_the_tables() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 100)[0] == pytest.approx(0.0, abs=1e-12)
    mean, low, high = mean_interval([[1.0], [2.0], [3.0]])
    assert (mean, high - mean) == pytest.approx((2.0, 1.96 / 3**0.5))
    # the same values again tell nothing new where they are the same row's
    assert mean_interval([[1.0] * 9, [2.0] * 9, [3.0] * 9]) == pytest.approx((mean, low, high))


def test_one_key_of_json_can_be_scored_alone() -> None:
    intent = scorer("json.intent")

    assert intent('{"intent": "Play", "slots": {}}', '{"intent": "Play", "slots": {"a": 1}}')
    assert not intent('{"intent": "Stop"}', '{"intent": "Play"}')
    assert not intent('{"slots": 1}', '{"slots": 1}')
    assert not intent('{"intent": "Play"', '{"intent": "Play"}')
    with pytest.raises(ConfigError, match="not one of exact"):
        scorer("json.")
