"""Fixtures of the tests that start real servers."""

from __future__ import annotations

import pytest

from tests.e2e.kit import Kit


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(tmp_path_factory.mktemp("kit"))
