"""Each client of `run.py` against the HTTP door; `--slow` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients import run


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", run.PACKAGES)
def test_a_client_works_unchanged(name: str) -> None:
    cache = Path.home() / ".cache" / "loriner" / "clients"
    with run.server_for(name) as url:
        assert run.run(name, url, "pirate", cache)
