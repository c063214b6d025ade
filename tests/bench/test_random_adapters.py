"""Random adapters: shapes and ranks, that they differ and cost no memory, their PEFT folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loriner.adapters.formats import peft
from loriner.bench.random_adapters import RandomAdapters, adapter_bytes
from loriner.bench.shapes import hf_config
from loriner.model.config import ModelConfig

CONFIG = ModelConfig.from_hf(hf_config("tiny"))


def test_ranks_are_taken_in_turns_over_all_seven_linears() -> None:
    adapters = RandomAdapters(CONFIG, (4, 8))
    first, second = adapters.adapter(0), adapters.adapter(1)

    assert (first.ranks, second.ranks) == ((4,), (8,))
    assert set(first.modules) == set(CONFIG.linears())
    for name, (n, k) in CONFIG.linears().items():
        assert first.modules[name].a.shape == (4, k)
        assert first.modules[name].b.shape == (n, 4)
    assert first.num_bytes == adapters.num_bytes(0) == adapter_bytes(CONFIG, 4)


def test_a_rank_16_adapter_of_llama_3_8b_is_84_mb() -> None:
    config = ModelConfig.from_hf(hf_config("llama-3-8b"))

    assert adapter_bytes(config, 16) == 83_886_080


def test_a_thousand_adapters_differ_and_share_one_pool() -> None:
    adapters = RandomAdapters(CONFIG, (16,))
    made = [adapters.adapter(index) for index in range(1000)]
    name = next(iter(CONFIG.linears()))

    assert len({tuple(one.modules[name].a[0, :8].tolist()) for one in made}) > 990
    storages = {w.a.untyped_storage().data_ptr() for one in made for w in one.modules.values()}
    assert len(storages) == 1
    assert torch.equal(adapters.load(made[7].generation).modules[name].b, made[7].modules[name].b)


def test_its_folder_is_one_that_peft_could_have_written(tmp_path: Path) -> None:
    adapters = RandomAdapters(CONFIG, (8,), seed=1)
    loaded = peft.load(adapters.write(3, tmp_path / "three"), CONFIG.modules())
    made = adapters.adapter(3)

    assert loaded.modules.keys() == made.modules.keys()
    for name, weight in made.modules.items():
        assert torch.equal(loaded.modules[name].a, weight.a)
        assert torch.equal(loaded.modules[name].b, weight.b)
        assert loaded.modules[name].scaling == weight.scaling


@pytest.mark.parametrize("rank", [1, 64, 256])
def test_the_pool_holds_the_largest_tensor_of_any_rank(rank: int) -> None:
    adapters = RandomAdapters(CONFIG, (rank,))

    assert adapters.adapter(999).max_rank == rank
