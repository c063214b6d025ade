"""The GPU sampler against float64: sets, draws, log-probabilities, whatever the logits are.

A draw is right when its uniform number lands in the token's stretch of the float64 CDF; a kept set
is right when it is the prefix that float64 gives. DELTA is the room for float32 exponentials.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings")
if not torch.cuda.is_available():
    pytest.skip("gpu: no CUDA device", allow_module_level=True)

from loriner.kernels.cuda.launch import Device
from loriner.kernels.cuda.sampling import Sampler, describe
from tests.gpu.sampled import (
    CASES,
    MAX_ROWS,
    POISON,
    Rows,
    check_all,
    check_kept,
    fetch,
    kept,
    normal,
    run,
)

pytestmark = pytest.mark.gpu


def equal(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    return np.repeat(rng.standard_normal((shape[0], 1)).astype(np.float32), shape[1], axis=1)


def two_best(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    logits = normal(rng, shape)
    for row in logits:
        row[rng.integers(0, shape[1], 2)] = 20.0
    return logits


def few_values(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    return rng.integers(-3, 3, shape).astype(np.float32)


def signed_zeros(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    return np.where(rng.random(shape) < 0.5, -0.0, 0.0).astype(np.float32)


def mostly_barred(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    logits = normal(rng, shape)
    logits[rng.random(shape) < 0.95] = -np.inf
    logits[:, rng.integers(shape[1])] = 1.0
    return logits


def huge(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    return normal(rng, shape) * np.float32(1e30)


def log_probabilities(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    return np.log(rng.random(shape) + 1e-9).astype(np.float32) - np.float32(1e-6)


def broken(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    logits = normal(rng, shape)
    for i, row in enumerate(logits):
        if i % 4 == 3:
            row[:] = -np.inf
        else:
            row[rng.integers(shape[1])] = (np.nan, np.inf, -np.nan)[i % 4]
    return logits


MAKERS = (
    normal,
    equal,
    two_best,
    few_values,
    signed_zeros,
    mostly_barred,
    huge,
    log_probabilities,
    broken,
)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("vocab", [1, 2, 5, 31, 1000, 4097, 49152])
def test_every_row_is_chosen_right(
    samplers: Callable[[int], Sampler], rng: np.random.Generator, vocab: int, make: Any
) -> None:
    check_all(samplers(vocab), make(rng, (len(CASES), vocab)), CASES, rng)


@pytest.mark.parametrize("make", [normal, equal, log_probabilities], ids=lambda m: m.__name__)
@pytest.mark.parametrize("vocab", [128256, 151936, 262144])
def test_large_vocabularies(
    samplers: Callable[[int], Sampler], rng: np.random.Generator, vocab: int, make: Any
) -> None:
    check_all(samplers(vocab), make(rng, (len(CASES), vocab)), CASES, rng)


@pytest.mark.parametrize("spare", [1, 3, 4, 64])
def test_rows_may_lie_any_stride_apart(
    samplers: Callable[[int], Sampler], rng: np.random.Generator, spare: int
) -> None:
    sampler, count = samplers(4097), len(CASES)
    logits = normal(rng, (count, 4097))
    seeds, places = rng.integers(0, 2**63, count), np.arange(count, dtype=np.int32)
    expected = run(sampler, logits, CASES, seeds, places)
    wide = torch.full((count, 4097 + spare), torch.inf, device="cuda")
    wide[:, :4097] = torch.from_numpy(logits).cuda()
    sampler.results.fill_(POISON)
    sampler(wide[:, :4097])
    for name, values in fetch(sampler, count).items():
        np.testing.assert_array_equal(values, expected[name])


@pytest.mark.parametrize(
    "case",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.05},
    ],
)
def test_draws_follow_the_probabilities(
    samplers: Callable[[int], Sampler], rng: np.random.Generator, case: dict[str, Any]
) -> None:
    """Pearson's chi-square over 20,000 draws; 5 sigma."""
    sampler, vocab, num_launches = samplers(1000), 1000, 157
    row = normal(rng, (1, vocab))[0]
    logits = torch.from_numpy(row).cuda().repeat(MAX_ROWS, 1)
    drawn = []
    for launch in range(num_launches):
        seeds = rng.integers(0, 2**63, MAX_ROWS)
        rows = np.concatenate([describe(seed=int(seed), **case) for seed in seeds])
        sampler.load(rows, np.full(MAX_ROWS, launch, dtype=np.int32))
        sampler(logits)
        drawn.append(sampler.ids.clone())
    mask = kept(row, fetch(sampler, 1)["cuts"][0])
    check_kept(row, mask, case)
    probs = np.where(mask, np.exp(row.astype(np.float64) / case["temperature"]), 0.0)
    counts = np.bincount(torch.cat(drawn).cpu().numpy(), minlength=vocab)
    assert counts[~mask].sum() == 0
    expected = probs / probs.sum() * counts.sum()
    often = expected >= 5
    parts = [(counts[often], expected[often])]
    if expected[~often].sum() >= 5:
        parts.append((counts[~often].sum(keepdims=True), expected[~often].sum(keepdims=True)))
    chi = sum(float(((seen - wanted) ** 2 / wanted).sum()) for seen, wanted in parts)
    freedom = sum(len(seen) for seen, _ in parts) - 1
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom) + 5


def test_a_row_does_not_depend_on_its_neighbours(
    samplers: Callable[[int], Sampler], rng: np.random.Generator
) -> None:
    sampler, cases = samplers(49152), CASES * 4
    logits = normal(rng, (len(cases), 49152))
    logits[5] = np.nan
    seeds = rng.integers(0, 2**63, len(cases))
    places = rng.integers(0, 100, len(cases)).astype(np.int32)
    together = run(sampler, logits, cases, seeds, places)
    order = rng.permutation(len(cases))
    moved = run(sampler, logits[order], [cases[i] for i in order], seeds[order], places[order])
    for name, values in moved.items():
        np.testing.assert_array_equal(values, together[name][order])
    for i in range(16):
        alone = run(
            sampler, logits[i : i + 1], cases[i : i + 1], seeds[i : i + 1], places[i : i + 1]
        )
        for name, values in alone.items():
            np.testing.assert_array_equal(values[0], together[name][i])


def test_cutting_a_row_otherwise_changes_nothing(rng: np.random.Generator) -> None:
    """Masses are integers: eight blocks and one give the same bits."""
    device, other = Device(), Device()
    if device.capability < (9, 0):
        pytest.skip("this card has no other way")
    other.capability = (8, 0)
    logits = normal(rng, (len(CASES), 32000))
    seeds, places = rng.integers(0, 2**63, len(CASES)), np.arange(len(CASES), dtype=np.int32)
    outs = [run(Sampler(d, 32000, MAX_ROWS), logits, CASES, seeds, places) for d in (device, other)]
    for name, values in outs[0].items():
        np.testing.assert_array_equal(values, outs[1][name])


@pytest.mark.parametrize("vocab", [1, 33, 49152, 128256])
def test_barred_tokens_are_those_without_a_bit_in_the_rows_that_are_named(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    sampler = Sampler(Device(), vocab, 8)
    logits = torch.from_numpy(normal(rng, (6, vocab))).cuda()
    rows = [4, 0, 3]
    bits = rng.random((3, -(-vocab // 32) * 32)) < 0.1
    bits[:, 0] = True
    words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    wanted = logits.clone()
    for row, own in zip(rows, bits, strict=True):
        wanted[row][~torch.from_numpy(own[:vocab]).cuda()] = -math.inf

    sampler.bar(logits, rows, list(words))

    assert torch.equal(logits, wanted)
