"""What the GPU sampler is given for a step: biases and barred tokens beside the CPU's sampler,
padding, graphs, steps in flight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings")
if not torch.cuda.is_available():
    pytest.skip("gpu: no CUDA device", allow_module_level=True)

from loriner.core import Sequence
from loriner.engine.sampler import sample
from loriner.engine.step_input import Draw
from loriner.kernels.cuda.sampling import MAX_TOP, NO_LISTS, Sampler, adjustments, describe
from tests.fakes import make_sequence
from tests.gpu.sampled import CASES, MAX_ROWS, POISON, Rows, check_logprobs, fetch, normal

pytestmark = pytest.mark.gpu

EOS = (0,)
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
    logits = torch.from_numpy(normal(rng, (1, 32000))).cuda().repeat(MAX_ROWS, 1)
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
    masks = 4 * MAX_ROWS * (1 + sampler.num_words)
    assert copies + masks < sampler.num_bytes < copies + masks + (2 << 20)
    assert sampler.top_ids.shape == (MAX_ROWS, MAX_TOP)
