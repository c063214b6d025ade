"""Random adapters into a store on disk, by several processes at once.

Knows no engine. Threads would wait for one another: Python has a tenth of a second of each adapter.
"""

from __future__ import annotations

import functools
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from loriner.bench.random_adapters import RandomAdapters

if TYPE_CHECKING:
    from loriner.adapters.store import Store
    from loriner.bench.random_base import RandomBase
    from loriner.model.config import ModelConfig

MOST_WRITERS = 12  # processes; an adapter of rank 16 takes half a second of one


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a process needs in order to write and publish any of the adapters."""

    root: Path  # of the store
    config: ModelConfig
    base_digest: str
    ranks: tuple[int, ...]
    seed: int

    def open(self) -> tuple[Store, RandomAdapters]:
        from loriner.adapters.store import Store

        adapters = RandomAdapters(self.config, self.ranks, seed=self.seed)
        return Store(self.root, self.config.modules(), self.base_digest), adapters


@functools.cache
def _opened(recipe: Recipe) -> tuple[Store, RandomAdapters]:
    """Once in each process that publishes."""
    import torch

    torch.set_num_threads(1)
    return recipe.open()


def publish(root: Path, base: RandomBase, adapters: RandomAdapters, count: int) -> list[str]:
    """Write and publish adapters 0 to count - 1 in the store at `root`; their generations."""
    recipe = Recipe(root, base.config, base.base_digest, adapters.ranks, adapters.seed)
    writers = min(MOST_WRITERS, len(os.sched_getaffinity(0)), count)
    with ProcessPoolExecutor(writers, get_context("spawn")) as processes:
        return list(processes.map(partial(_publish, recipe), range(count)))


def _publish(recipe: Recipe, index: int) -> str:
    store, adapters = _opened(recipe)
    with tempfile.TemporaryDirectory(dir=store.root.parent) as own:
        written = adapters.write(index, Path(own) / "adapter")
        return store.publish(written, f"random-{index}").generation
