"""Fixtures of the store: one opened on an empty folder, and adapters to publish."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loriner.adapters.store import Store
from tests.adapters.samples import BASE, TINY, Make, write_adapter


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store", TINY, BASE) as store:
        yield store


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A folder with an adapter of its own for each number."""
    return lambda seed: write_adapter(tmp_path / f"adapter-{seed}", seed=seed)
