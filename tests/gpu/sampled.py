"""The GPU sampler's rows as tests run and check them: its kept sets and draws against float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from loriner.engine.sampler import uniform
from loriner.kernels.cuda.sampling import Sampler, describe

DELTA = 5e-6  # of the whole mass
POISON = 0x7FC00000  # a NaN, and no token
MAX_ROWS = 128
CASES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 50},
    {"temperature": 0.1, "top_k": 300},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.05},
    {"temperature": 1.0, "top_p": 0.9999},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1e-300},
    {"temperature": 1e-5, "top_p": 0.5, "top_k": 9},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 1.0, "top_k": 3, "logprobs": 20},
    {"temperature": 1.0, "logprobs": 7},
]
Rows = np.ndarray[Any, Any]


def run(
    sampler: Sampler, logits: Rows, cases: list[dict[str, Any]], seeds: Any, places: Any
) -> dict[str, Rows]:
    rows = np.concatenate([describe(seed=int(s), **c) for c, s in zip(cases, seeds, strict=True)])
    sampler.results.fill_(POISON)
    sampler.load(rows, places)
    sampler(torch.from_numpy(logits).cuda())
    return fetch(sampler, len(cases))


def fetch(sampler: Sampler, count: int) -> dict[str, Rows]:
    names = ("ids", "logprobs", "top_ids", "top_logprobs", "cuts")
    return {name: getattr(sampler, name)[:count].cpu().numpy().copy() for name in names}


def kept(row: Rows, cut: Rows) -> Rows:
    """The ids that a cut keeps, as a mask."""
    value, ties = cut[:1].view(np.float32)[0], int(cut[1])
    mask: Rows = row > value
    mask[np.flatnonzero(row == value)[:ties]] = True
    return mask


def weights(row: Rows, temperature: float) -> Rows:
    """Probabilities in float64, the best token's 1."""
    with np.errstate(over="ignore"):  # a tiny temperature
        scaled: Rows = (row.astype(np.float64) - row.max()) / temperature
    return np.exp(scaled)


def check_kept(row: Rows, mask: Rows, case: dict[str, Any]) -> None:
    """`mask` is the prefix of the sorted row that the filters leave, up to DELTA at its end."""
    order = np.lexsort((np.arange(len(row)), -row))
    probs = weights(row, case["temperature"])[order]
    num_kept = int(mask.sum())
    assert mask[order[:num_kept]].all()
    count, doubtful = len(row), np.zeros(len(row), dtype=bool)
    if min_p := case.get("min_p"):
        count = int((probs >= min_p).sum())
        doubtful |= abs(probs - min_p) < DELTA * min_p
    if case.get("top_k"):
        count = min(count, case["top_k"])
    if (top_p := case.get("top_p", 1.0)) < 1.0:
        before = (probs.cumsum() - probs) / probs[:count].sum()
        count = min(count, int((before < top_p).sum()))
        doubtful |= abs(before - top_p) < DELTA
    wrong = slice(*sorted((max(count, 1), num_kept)))
    if not (case.get("min_p") and doubtful.any()):
        assert doubtful[wrong].all(), (case, count, num_kept)


def check_draw(row: Rows, mask: Rows, case: dict[str, Any], token: int, u: float) -> None:
    assert mask[token]
    cdf = np.where(mask, weights(row, case["temperature"]), 0.0).cumsum()
    low = cdf[token - 1] if token else 0.0
    assert low / cdf[-1] - DELTA <= u <= cdf[token] / cdf[-1] + DELTA, (case, token)


def check_logprobs(row: Rows, out: dict[str, Rows], i: int, num_top: int) -> None:
    expected = torch.from_numpy(row).double().log_softmax(-1).numpy()
    assert out["logprobs"][i] == pytest.approx(expected[out["ids"][i]], rel=1e-5, abs=1e-5)
    few = min(num_top, len(row))
    best = np.lexsort((np.arange(len(row)), -row))[:few]
    assert out["top_ids"][i, :few].tolist() == best.tolist()
    np.testing.assert_allclose(out["top_logprobs"][i, :few], expected[best], rtol=1e-5, atol=1e-5)
    assert (out["top_ids"][i, few:] == POISON).all()


def check_all(
    sampler: Sampler, logits: Rows, cases: list[dict[str, Any]], rng: np.random.Generator
) -> None:
    seeds = rng.integers(0, 2**63, len(cases))
    places = rng.integers(0, 10000, len(cases)).astype(np.int32)
    out = run(sampler, logits, cases, seeds, places)
    for i, (row, case) in enumerate(zip(logits, cases, strict=True)):
        token = int(out["ids"][i])
        if not math.isfinite(torch.from_numpy(row).max()):
            assert token == -1
            continue
        if case["temperature"] == 0.0:
            assert token == int(np.flatnonzero(row == row.max())[0])
        else:
            mask = kept(row, out["cuts"][i])
            check_kept(row, mask, case)
            check_draw(row, mask, case, token, uniform(int(seeds[i]), int(places[i])))
        if case.get("logprobs") is not None:
            check_logprobs(row, out, i, case["logprobs"])
        else:
            assert np.isnan(out["logprobs"][i]) and np.isnan(out["top_logprobs"][i]).all()


def normal(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    return (rng.standard_normal(shape) * 3).astype(np.float32)
