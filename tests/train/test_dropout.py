"""What is dropped: the share that was asked for, everywhere, and nothing that follows a pattern."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loriner.train.dropout import Dropout, seed_of

ROWS, COLUMNS = 512, 1536


def kept(share: float, seed: int = 1, module: str = "q_proj") -> Tensor:
    """1 where an element stays, f32."""
    dropout = Dropout(share, torch.tensor(seed, dtype=torch.int32), seed_of(module))
    return (dropout(torch.ones(ROWS, COLUMNS)) > 0).float()


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1])


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9])
def test_each_row_and_column_drops_its_share(share: float) -> None:
    """Six standard deviations of a fair draw, for each of 2,048 of them."""
    found = kept(share)
    deviation = (share * (1 - share)) ** 0.5
    assert abs(found.mean() - (1 - share)) < 6 * deviation / (ROWS * COLUMNS) ** 0.5
    assert (found.mean(0) - (1 - share)).abs().max() < 6 * deviation / ROWS**0.5
    assert (found.mean(1) - (1 - share)).abs().max() < 6 * deviation / COLUMNS**0.5


def test_what_stays_is_larger_by_as_much_as_is_lost() -> None:
    dropout = Dropout(0.25, torch.tensor(7, dtype=torch.int32), 0)
    x = torch.full((ROWS, COLUMNS), 3.0)
    assert set(dropout(x).unique().tolist()) == {0.0, 4.0}
    assert dropout(x).mean() == pytest.approx(3.0, rel=0.01)


def test_seeds_modules_rows_and_columns_have_nothing_to_do_with_each_other() -> None:
    first, limit = kept(0.5), 6 / (ROWS * COLUMNS) ** 0.5
    others = [kept(0.5, seed) for seed in (0, 2, -1, 1 << 16)]
    others += [kept(0.5, module=name) for name in ("k_proj", "model.layers.31.mlp.down_proj")]
    for other in others:
        assert abs(correlation(first, other)) < limit
    for shift in (1, 2, 3, 64, 256):
        assert abs(correlation(first[shift:], first[:-shift])) < 1.1 * limit
        assert abs(correlation(first[:, shift:], first[:, :-shift])) < 1.5 * limit
    squares = first[1:, 1:] + first[:-1, :-1] - first[1:, :-1] - first[:-1, 1:]
    assert squares.square().mean() == pytest.approx(1.0, rel=0.01)


def test_more_rows_and_columns_change_nothing() -> None:
    dropout = Dropout(0.3, torch.tensor(5, dtype=torch.int32), 9)
    whole = dropout(torch.ones(ROWS, COLUMNS))
    assert torch.equal(dropout(torch.ones(100, 200)), whole[:100, :200])
    assert torch.equal(dropout(torch.ones(ROWS, COLUMNS, dtype=torch.bfloat16)) > 0, whole > 0)
