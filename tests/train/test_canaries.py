"""Canaries: when a replay agrees, and what is said when it does not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from loriner.errors import TrainError
from loriner.train.canaries import FILE, Canaries, Canary, Replay, difference, read, write

CANARY = Canary((), "hi", (1, 2), (7, 8), ((-0.1, -3.0), (-0.69, -0.70)))
SAME = Replay(CANARY.prompt_ids, CANARY.token_ids, CANARY.logprobs)


def test_the_same_is_no_difference() -> None:
    assert difference(CANARY, SAME, 0.01) is None
    assert difference(CANARY, dataclasses.replace(SAME, prompt_ids=None), 0.01) is None
    near = dataclasses.replace(SAME, logprobs=((-0.105, -3.005), (-0.69, -0.70)))
    assert difference(CANARY, near, 0.01) is None


def test_a_near_tie_may_fall_to_either_side() -> None:
    other = dataclasses.replace(SAME, token_ids=(7, 9))
    assert difference(CANARY, other, 0.01) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt_ids": (1, 3)}, "chat template or tokenizer differ"),
        ({"token_ids": (6, 8)}, "token 1 is 6, not 7"),
        ({"token_ids": (7,)}, "1 tokens came back, 2 were asked for"),
        ({"logprobs": ((-0.2, -3.0), (-0.69, -0.70))}, "token 1: a log-probability is 0.1 off"),
        ({"logprobs": ((-0.1, -3.0), (-0.69, float("nan")))}, "token 2: a log-probability is nan"),
        ({"logprobs": ((-0.1, -3.0),)}, "no log-probabilities came back"),
        ({"logprobs": ((-0.109, -3.009), (-0.69, -0.70))}, "are 0.0045 off on average"),
    ],
)
def test_a_difference_is_told_in_words(changes: dict[str, tuple[int, ...]], said: str) -> None:
    found = difference(CANARY, dataclasses.replace(SAME, **changes), 0.01)  # type: ignore[arg-type]
    assert found is not None
    assert said in found


def test_a_folder_without_canaries_or_with_broken_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="not made by `loriner train`"):
        read(tmp_path)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(TrainError, match="cannot be read"):
        read(tmp_path)
    write(tmp_path, Canaries("d" * 64, "float32", (CANARY,)))
    assert read(tmp_path).canaries == (CANARY,)
    document = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(document | {"format": 2}))
    with pytest.raises(TrainError, match="format 2"):
        read(tmp_path)
