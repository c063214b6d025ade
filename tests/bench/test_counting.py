"""What is counted rather than measured: popularity, bytes of a step, FLOP; and how it is timed."""

from __future__ import annotations

import argparse

import pytest

from loriner.bench import options
from loriner.bench.popularity import BASE, picks
from loriner.bench.random_adapters import adapter_bytes
from loriner.bench.shapes import hf_config
from loriner.bench.timing import Stopwatch, matmul_rate, read_bandwidth
from loriner.bench.traffic import prefill_flop, step_traffic
from loriner.model.config import ModelConfig

LLAMA = ModelConfig.from_hf(hf_config("llama-3-8b"))
READ = 4.45e12  # bytes a second


@pytest.mark.parametrize(
    ("rows", "context", "base_ms", "distinct_ms"),
    [
        (1, 192, 1.05, 1.07),
        (8, 192, 1.09, 1.24),
        (32, 192, 1.23, 1.83),
        (64, 192, 1.41, 2.61),
        (128, 192, 1.77, 4.18),
        (128, 1024, 4.91, 7.32),
    ],
)
def test_the_floor_of_a_step_is_what_its_bytes_take(
    rows: int, context: int, base_ms: float, distinct_ms: float
) -> None:
    """128 prompt and 128 new tokens are a mean context of 192."""

    def floor(adapters: int) -> float:
        sizes = [adapter_bytes(LLAMA, 16)] * adapters
        return 1e3 * step_traffic(LLAMA, sizes, rows, context, 2).total / READ

    assert floor(0) == pytest.approx(base_ms, abs=0.006)
    assert floor(rows) == pytest.approx(distinct_ms, abs=0.006)


def test_the_flop_of_a_prefill_are_two_for_each_weight_and_token() -> None:
    flop = prefill_flop(LLAMA, 2048, 0)

    assert flop / (2 * 2048 * 6.98e9) == pytest.approx(1.04, abs=0.02)  # and attention
    assert prefill_flop(LLAMA, 2048, 16) - flop == 2 * 2048 * adapter_bytes(LLAMA, 16) // 2


def test_popularities_spread_rows_as_their_names_say() -> None:
    assert picks("none", 3, 10) == [BASE] * 3
    assert picks("identical", 3, 10) == [0, 0, 0]
    assert picks("distinct", 3, 10) == [0, 1, 2]
    assert picks("skewed", 6, 10) == [0, 0, 0, 0, 1, 2]
    assert picks("uniform", 64, 10) == picks("uniform", 64, 10)
    assert set(picks("uniform", 500, 10)) == set(range(10))
    zipf = picks("zipf:1.2", 500, 1000)
    assert zipf.count(0) > 5 * zipf.count(9)
    assert picks("uniform", 64, 10, seed=1) != picks("uniform", 64, 10)


@pytest.mark.parametrize("wrong", ["zipf", "zipf:x", "zipf:-1", "often", ""])
def test_an_unknown_popularity_is_refused(wrong: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a popularity is one of none, identical"):
        options.popularities(wrong)


@pytest.mark.parametrize("wrong", ["0", "x", "", "8,,8", "300"])
def test_ranks_outside_1_to_256_are_refused(wrong: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        options.ranks(wrong)


def test_a_stopwatch_counts_every_launch_of_a_round() -> None:
    watch, launched = Stopwatch("cpu"), []
    us = watch.each_us([lambda: launched.append(1), lambda: launched.append(2)], repeats=5)

    assert us >= 0
    assert launched == [1, 2] * 8  # three rounds to warm up


def test_the_limits_of_this_machine_can_be_measured() -> None:
    watch = Stopwatch("cpu")

    assert read_bandwidth(watch, 1 << 20) > 1e6
    assert matmul_rate(watch, 32) > 1e5
