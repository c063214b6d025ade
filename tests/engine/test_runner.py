"""Which device is taken, and what is said when there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loriner.config import EngineConfig
from loriner.engine.runner import choose_device, open_runner
from loriner.errors import ConfigError


def card(capability: tuple[int, int] | None) -> Any:
    return SimpleNamespace(
        is_available=lambda: capability is not None, get_device_capability=lambda: capability
    )


@pytest.mark.parametrize(
    ("wanted", "capability", "device"),
    [
        ("auto", None, "cpu"),
        ("auto", (7, 5), "cpu"),
        ("auto", (8, 0), "cuda"),
        ("auto", (10, 0), "cuda"),
        ("cpu", (9, 0), "cpu"),
        ("cuda", (9, 0), "cuda"),
    ],
)
def test_auto_takes_a_card_that_can_run_the_kernels(
    wanted: str, capability: tuple[int, int] | None, device: str
) -> None:
    assert choose_device(wanted, card(capability)) == device


@pytest.mark.parametrize(("capability", "why"), [(None, "CUDA"), ((7, 5), "8.0")])
def test_asking_for_a_card_that_is_not_there_says_why(
    capability: tuple[int, int] | None, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        choose_device("cuda", card(capability))


def test_a_shadow_in_bf16_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="bf16_shadow"):
        open_runner(EngineConfig(device="cpu", bf16_shadow=True))
