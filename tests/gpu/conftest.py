"""What tests on a GPU share: the kernels and samplers, made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

ROWS = (1, 2, 7, 8, 9, 16, 33, 64, 127, 128, 129, 255, 513)
RANKS = (1, 4, 8, 16, 24, 64, 128, 256)


@pytest.fixture(scope="session")
def kernels() -> Any:
    """The CUDA backend."""
    from loriner import kernels

    return kernels.select("cuda")


@pytest.fixture(scope="module", params=["cluster", "one block a row"])
def samplers(request: pytest.FixtureRequest) -> Callable[[int], Any]:
    """A sampler for a vocabulary, as this card runs it and as cards before sm_90 do."""
    from loriner.kernels.cuda.launch import Device
    from loriner.kernels.cuda.sampling import Sampler
    from tests.gpu.sampled import MAX_ROWS

    device = Device()
    if request.param != "cluster":
        if device.capability < (9, 0):
            pytest.skip("this card has no other way")
        device.capability = (8, 0)
    made: dict[int, Sampler] = {}

    def get(vocab: int) -> Sampler:
        if vocab not in made:
            made[vocab] = Sampler(device, vocab, MAX_ROWS)
        return made[vocab]

    return get


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(sum(request.node.name.encode()))
