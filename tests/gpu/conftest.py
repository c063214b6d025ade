"""What tests on a GPU share: the kernels, made once, and how an error is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

ROWS = (1, 2, 7, 8, 9, 16, 33, 64, 127, 128, 129, 255, 513)
RANKS = (1, 4, 8, 16, 24, 64, 128, 256)


@pytest.fixture(scope="session")
def kernels() -> Any:
    """The CUDA backend."""
    from loriner import kernels

    return kernels.select("cuda")


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(sum(request.node.name.encode()))
