"""What every test gets: one thread, no hub, no settings from the shell, and the skip rules.

Imports no room of the project before a fixture asks for it; what one room alone needs lives beside
its tests.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from loriner.engine.grammars import Grammars

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SETTINGS_OF_THE_TESTS = ("LORINER_OFFLINE", "LORINER_TEST_MODEL", "LORINER_TEST_ADAPTERS")
ROOT = Path(__file__).resolve().parent.parent

# Set before anything imports torch, and inherited by the engine processes that tests start.
os.environ.update(dict.fromkeys(THREADS, "1"))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
for _name in [name for name in os.environ if name.startswith("LORINER_")]:
    if _name not in SETTINGS_OF_THE_TESTS:
        del os.environ[_name]

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # How long an example takes depends on what else the machine does; tests have a timeout.
    settings.register_profile("loriner", deadline=None)
    settings.load_profile("loriner")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("slow: give --slow to run it")
    if item.get_closest_marker("network") and os.environ.get("LORINER_OFFLINE") == "1":
        pytest.skip("network: LORINER_OFFLINE=1")
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("gpu: no CUDA device")
    for marker in item.iter_markers("clients"):
        missing = [name for name in marker.args if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"clients: {', '.join(missing)} not installed")


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real base, as `loriner pull smollm2` leaves it."""
    folder = Path(os.environ.get("LORINER_TEST_MODEL", ROOT / "models" / "smollm2-nf4"))
    if not (folder / "config.json").exists():
        pytest.skip("the base is not here: run `loriner pull smollm2`")
    return folder


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    """Of the tiny base."""
    from tests.grammars import open_grammars

    with open_grammars() as opened:
        yield opened


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
