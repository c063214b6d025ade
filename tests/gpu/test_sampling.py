"""The GPU sampler against float64 and the CPU's sampler: sets, draws, biases, log-probabilities.

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

from loriner.core import Sequence
from loriner.engine.sampler import sample, uniform
from loriner.engine.step_input import Draw
from loriner.kernels.cuda.launch import Device
from loriner.kernels.cuda.sampling import MAX_TOP, NO_LISTS, Sampler, adjustments, describe
from tests.fakes import make_sequence

pytestmark = pytest.mark.gpu

DELTA = 5e-6  # of the whole mass
POISON = 0x7FC00000  # a NaN, and no token
MAX_ROWS = 128
EOS = (0,)
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


@pytest.fixture(scope="module", params=["cluster", "one block a row"])
def samplers(request: pytest.FixtureRequest) -> Callable[[int], Sampler]:
    """A sampler for a vocabulary, as this card runs it and as cards before sm_90 do."""
    device = Device()
    if request.param != "cluster":
        if device.capability < (9, 0):
            pytest.skip("this card has no other way")
        device.capability = (8, 0)
    made: dict[int, Sampler] = {}

    def get(vocab: int) -> Sampler:
        if vocab not in made:
            made[vocab] = Sampler(device, vocab, MAX_ROWS)
        return made[vocab]

    return get


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


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


def test_logits_are_not_changed(
    samplers: Callable[[int], Sampler], rng: np.random.Generator
) -> None:
    sampler = samplers(4097)
    logits = torch.from_numpy(normal(rng, (1, 4097))).cuda()
    before = logits.clone()
    sampler.load(
        describe(temperature=1.0),
        [2],
        {0: adjustments([(9, 5.0)], barred=(8,))},
    )
    sampler(logits)
    assert torch.equal(logits, before)


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
    logits = torch.from_numpy(row).cuda().repeat(MAX_ROWS)
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


ADJUSTED: list[dict[str, Any]] = [
    {"temperature": 0.0, "min_tokens": 4},
    {"temperature": 0.0, "logit_bias": ((1, 5.0), (3, -100.0), (2, 0.5)), "logprobs": 20},
    {"temperature": 0.8, "top_k": 20, "logit_bias": ((2, 30.0),)},
    {"temperature": 1.0, "min_tokens": 9, "stop_token_ids": (4,), "logit_bias": ((4, 8.0),)},
]


def describe_sequence(sequence: Sequence) -> Any:
    params = sequence.request.sampling
    return describe(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=sequence.seed,
        logprobs=params.logprobs,
    )


def lists_of(sequences: list[Sequence], places: Rows) -> dict[int, Any]:
    lists = {}
    for i, (sequence, place) in enumerate(zip(sequences, places.tolist(), strict=True)):
        params = sequence.request.sampling
        barred = {*EOS, *params.stop_token_ids} if place < params.min_tokens else ()
        lists[i] = adjustments(params.logit_bias, barred)
    return {i: entries for i, entries in lists.items() if len(entries)}


@pytest.mark.parametrize("vocab", [50, 4097, 32000])
def test_biases_and_barred_tokens_are_the_cpus(
    samplers: Callable[[int], Sampler], rng: np.random.Generator, vocab: int
) -> None:
    """All steps are launched before one token is read; then the CPU goes the same way."""
    sampler, num_steps, count = samplers(vocab), 16, len(ADJUSTED)
    sequences = []
    for i, case in enumerate(ADJUSTED):
        prompt = rng.integers(0, vocab, rng.integers(1, 300)).tolist()
        sequences.append(make_sequence(prompt, **{"max_tokens": 100, **case}))
        for token in rng.integers(0, vocab, 2 * (i % 2)).tolist():  # resumed
            sequences[i].append(token)
    rows = np.concatenate([describe_sequence(s) for s in sequences])
    places = np.array([sequence.num_output for sequence in sequences], dtype=np.int32)
    base = normal(rng, (count, vocab))
    steps = [base + normal(rng, (count, vocab)) * np.float32(0.1) for _ in range(num_steps)]
    got = []
    for step, logits in enumerate(steps):
        sampler.results.fill_(POISON)
        sampler.load(rows, places + np.int32(step), lists_of(sequences, places + step))
        sampler(torch.from_numpy(logits).cuda())
        got.append(sampler.results.clone())
    num_other = 0
    for step, logits in enumerate(steps):
        sampler.results.copy_(got[step])
        out = fetch(sampler, count)
        draws = [Draw.of(sequence, sequence.num_known) for sequence in sequences]
        for i, chosen in enumerate(sample(torch.from_numpy(logits), draws, EOS)):
            token, params = int(out["ids"][i]), sequences[i].request.sampling
            if params.greedy:
                assert token == chosen.token_id, (step, ADJUSTED[i])
            num_other += token != chosen.token_id
            if params.logprobs is not None:
                check_logprobs(logits[i], out, i, params.logprobs)
            sequences[i].append(token)
    assert num_other <= 1  # a draw within float32's error of a boundary


def test_what_bars_every_token_leaves_none(samplers: Callable[[int], Sampler]) -> None:
    sampler = samplers(5)
    for temperature in (0.0, 1.0):
        sampler.load(
            describe(temperature=temperature), [0], {0: adjustments(barred=(0, 1, 2, 3, 4))}
        )
        sampler(torch.zeros(1, 5, device="cuda"))
        assert sampler.ids[0].item() == -1


def test_a_full_list_of_biases(
    samplers: Callable[[int], Sampler], rng: np.random.Generator
) -> None:
    sampler, vocab, count = samplers(32000), 32000, 64
    logits = normal(rng, (count, vocab))
    bias = [
        {int(t): float(rng.uniform(-100, 100)) for t in rng.integers(0, vocab, 1024)}
        for _ in range(count)
    ]
    rows = np.concatenate([describe(temperature=0.0)] * count)
    lists = {i: adjustments(b.items()) for i, b in enumerate(bias) if i % 3}
    sampler.load(rows, np.zeros(count, dtype=np.int32), lists)
    sampler(torch.from_numpy(logits).cuda())
    for i, entries in lists.items():
        logits[i, entries["id"]] += entries["add"]
    assert sampler.ids[:count].tolist() == logits.argmax(-1).tolist()


def test_rows_of_padding_choose_nothing(
    samplers: Callable[[int], Sampler], rng: np.random.Generator
) -> None:
    sampler = samplers(4097)
    logits = torch.from_numpy(normal(rng, (8, 4097))).cuda()
    sampler.results.fill_(POISON)
    sampler.load(np.concatenate([describe(temperature=0.0)] * 3), [0, 0, 0])
    sampler(logits)
    assert sampler.ids[:8].tolist() == [*logits[:3].argmax(-1).tolist(), -1, -1, -1, -1, -1]
    assert (sampler.ids[8:] == POISON).all()


def test_one_graph_serves_any_parameters(
    samplers: Callable[[int], Sampler], rng: np.random.Generator
) -> None:
    sampler, count = samplers(32000), len(CASES)
    static = torch.zeros(count, 32000, device="cuda")
    sampler.load(np.concatenate([describe(temperature=0.0)] * count), [0] * count)
    sampler(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler(static)
    for turn in range(6):
        cases = CASES[turn:] + CASES[:turn]
        logits = normal(rng, (count, 32000))
        seeds = rng.integers(0, 2**63, count)
        places = rng.integers(0, 99, count).astype(np.int32)
        lists = {turn: adjustments([(7, 50.0)], barred=(9,))} if turn % 2 else NO_LISTS
        eager = np.concatenate(
            [describe(seed=int(s), **c) for c, s in zip(cases, seeds, strict=True)]
        )
        static.copy_(torch.from_numpy(logits))
        outs = []
        for launch in (lambda: sampler(static), graph.replay):
            sampler.results.fill_(POISON)
            sampler.load(eager, places, lists)
            launch()  # type: ignore[no-untyped-call]
            outs.append(fetch(sampler, count))
        for name, values in outs[0].items():
            np.testing.assert_array_equal(values, outs[1][name])
        for i in set(range(count)) - set(lists):
            if cases[i]["temperature"] == 0.0:
                assert outs[1]["ids"][i] == logits[i].argmax()


def test_steps_in_flight_keep_their_own_parameters(
    samplers: Callable[[int], Sampler], rng: np.random.Generator
) -> None:
    """More steps are given than there are host buffers, none waited for."""
    sampler = samplers(32000)
    logits = torch.from_numpy(normal(rng, (1, 32000))).cuda().repeat(MAX_ROWS)
    rows, seen = [], []
    for seed in range(12):
        rows.append(np.concatenate([describe(temperature=1.0, seed=seed)] * MAX_ROWS))
        sampler.load(rows[-1], np.arange(MAX_ROWS, dtype=np.int32))
        sampler(logits)
        seen.append(sampler.ids.clone())
    torch.cuda.synchronize()
    for seed in range(12):
        sampler.load(rows[seed], np.arange(MAX_ROWS, dtype=np.int32))
        sampler(logits)
        assert torch.equal(sampler.ids, seen[seed])
    assert len({tuple(ids.tolist()) for ids in seen}) == 12


def test_the_memory_is_what_the_docstring_says(samplers: Callable[[int], Sampler]) -> None:
    sampler = samplers(128256)
    copies = 4 * MAX_ROWS * sampler.plan.padded if sampler.plan.cluster == 1 else 4
    assert copies < sampler.num_bytes < copies + (2 << 20)
    assert sampler.top_ids.shape == (MAX_ROWS, MAX_TOP)
