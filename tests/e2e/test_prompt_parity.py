"""What is read of prompts equals transformers and PEFT over the same NF4 folder, in fp32 on the
CPU: embeddings (the mean of the last hidden states, made length 1) and log-probabilities; alone,
and in one mixed, chunked batch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import loriner
from loriner.adapters.pool import SeatWeights
from loriner.core import Request, TokenLogprob
from loriner.engine.cpu_runner import CpuRunner
from tests.canaries import CANARIES
from tests.engines import build_engine, engine_config, seat_weights
from tests.fakes import make_request

ADAPTERS = Path(loriner.__file__).parent / "data" / "adapters"
NAMES = (None, "codeword", "pirate")
TOLERANCE = 1e-5  # of each of the 576 numbers of a vector of length 1
NATS = 1e-3
NUM_TOP = 5

Vectors = dict[str, NDArray[np.float32]]

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture(scope="module")
def runner(smollm2: Path) -> CpuRunner:
    return CpuRunner(engine_config(smollm2))


@pytest.fixture(scope="module")
def weights(runner: CpuRunner) -> Mapping[str, SeatWeights]:
    return seat_weights(runner.model_config, ADAPTERS, filter(None, NAMES))


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [*CANARIES[:4], " ".join(CANARIES), "a"]
    return [tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def requests(prompts: list[list[int]]) -> list[Request]:
    return [
        make_request(prompt, request_id=f"{name}/{i}", generation=name, embeds=True)
        for name in NAMES
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def told(oracle: Any, prompts: list[list[int]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The oracle's last hidden states [T, H] and log-probabilities [T, V]."""
    from peft import PeftModel

    made = {}
    for name in NAMES:
        model = oracle if name is None else PeftModel.from_pretrained(oracle, ADAPTERS / name)
        for i, prompt in enumerate(prompts):
            made[f"{name}/{i}"] = ask(model.eval(), prompt)
        if name is not None:
            model.unload()
    return made


@torch.inference_mode()
def ask(model: Any, prompt: list[int]) -> tuple[Tensor, Tensor]:
    answer = model(torch.tensor([prompt]), output_hidden_states=True)
    return answer.hidden_states[-1][0], answer.logits[0].float().log_softmax(-1)


@pytest.fixture(scope="module")
def expected(told: dict[str, tuple[Tensor, Tensor]]) -> Vectors:
    means = {name: hidden.double().mean(0) for name, (hidden, _) in told.items()}
    return {name: (mean / mean.norm()).float().numpy() for name, mean in means.items()}


def run(
    runner: CpuRunner,
    weights: Mapping[str, SeatWeights],
    batches: Iterable[list[Request]],
    **config: Any,
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    engine = build_engine(engine_config(runner.checkpoint.path, **config), weights, runner)
    for batch in batches:
        engine.run_all(batch)
    engine.close()
    for end in engine.ends.values():
        yield end.request_id, np.frombuffer(end.embedding, "<f4")


def check(found: Iterable[tuple[str, NDArray[np.float32]]], expected: Vectors) -> None:
    worst = {name: float(abs(vector - expected[name]).max()) for name, vector in found}
    assert worst.keys() == expected.keys()
    assert max(worst.values()) <= TOLERANCE, worst


def test_alone_they_equal_the_oracles(
    runner: CpuRunner,
    weights: Mapping[str, SeatWeights],
    requests: list[Request],
    expected: Vectors,
) -> None:
    check(run(runner, weights, [[request] for request in requests]), expected)


def test_mixed_and_chunked_they_equal_the_oracles(
    runner: CpuRunner,
    weights: Mapping[str, SeatWeights],
    requests: list[Request],
    expected: Vectors,
) -> None:
    shuffled = random.Random(0).sample(requests, len(requests))
    check(run(runner, weights, [shuffled], max_step_tokens=48), expected)


def test_the_oracles_vectors_differ_by_adapter(expected: Vectors) -> None:
    assert abs(expected["None/0"] - expected["pirate/0"]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("budget", [48, 512])
def test_log_probabilities_equal_the_oracles(
    runner: CpuRunner,
    weights: Mapping[str, SeatWeights],
    prompts: list[list[int]],
    told: dict[str, tuple[Tensor, Tensor]],
    budget: int,
) -> None:
    config = engine_config(runner.checkpoint.path, max_step_tokens=budget)
    engine = build_engine(config, weights, runner)
    for name in NAMES:
        for i, prompt in enumerate(prompts):
            sampling = {"prompt_logprobs": NUM_TOP, "max_tokens": 1, "request_id": f"{name}/{i}"}
            engine.submit(make_request(prompt, generation=name, **sampling))
    found = {}
    while engine.has_work:
        found |= {e.request_id: e.prompt_logprobs for e in engine.step() if e.prompt_logprobs}
    engine.close()

    assert found.keys() == told.keys()
    for name, (_, logprobs) in told.items():
        check_entries(found[name], logprobs)


def check_entries(entries: Sequence[TokenLogprob], logprobs: Tensor) -> None:
    assert len(entries) == len(logprobs)
    for entry, row in zip(entries[1:], logprobs, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=NATS)
        best = row.topk(NUM_TOP).values.tolist()
        assert [one.logprob for one in entry.top] == pytest.approx(best, abs=NATS)
        likelier = int((row > row[entry.token_id] + NATS).sum())
        as_likely = int((row > row[entry.token_id] - NATS).sum())
        assert likelier < entry.rank <= as_likely
