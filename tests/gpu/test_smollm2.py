"""SmolLM2 and the adapters that PEFT wrote for it, end to end on a GPU: its logits and tokens
against the fp32 CPU engine's, and each request's tokens whatever runs beside it.

The CPU engine equals transformers and PEFT (`tests/e2e/test_parity.py`), so neither is needed here.
`pytest tests/gpu/test_smollm2.py -s` prints the figures. LORINER_TEST_ADAPTERS names the folder of
the adapters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from loriner.adapters import formats
from loriner.adapters.memory import Weights
from loriner.config import GIB
from loriner.core import Request, SamplingParams
from loriner.engine.runner import open_runner
from tests.canaries import CANARIES
from tests.engines import RecordingRunner, WatchedEngine, engine_config
from tests.gpu.forced import Choices, ForcedRunner
from tests.gpu.operands import EXACT_ROWS

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "adapters"
ADAPTERS = Path(os.environ.get("LORINER_TEST_ADAPTERS", SHARED))
NUM_TOKENS = 64
NUM_KEPT = 4  # places of each answer whose logits are compared
MAX_ROWS = 64
MANY_ROWS = 1024

# The CPU engine with nothing changed but activations rounded to bf16 is off by 0.006 to 0.011 of
# the logits' norm, by 0.3 to 0.7 at most; 98.2 to 100 % of an adapter's tokens agree, 99.4 % of
# all. On a GPU weights are rounded as well: transformers in bf16 is off by 0.021, by 2.4 at most.
MAX_RELATIVE = 0.03
MAX_ABSOLUTE = 2.4  # logits go from some -35 to 40
MIN_AGREEMENT = 0.99  # of all tokens
MIN_AGREEMENT_OF_ONE = 0.98  # of one adapter's
MAX_FLIPS = 0.01

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def served_names() -> list[str]:
    if not ADAPTERS.is_dir():
        return []
    return sorted(p.name for p in ADAPTERS.iterdir() if p.is_dir() and "unsupported" not in p.name)


NAMES: list[str | None] = [None, *served_names()]


class Side:
    """An engine on one device. Requests are known by their place in `requests`."""

    def __init__(self, base: Path, device: str) -> None:
        config = engine_config(
            base,
            device=device,
            prefix_cache=False,
            max_sequences=MAX_ROWS,
            max_seats=len(NAMES),
            max_model_len=512,
            max_step_tokens=MANY_ROWS,
            kv_bytes=GIB,
            pool_bytes=GIB // 4,
            num_threads=0,
        )
        inner = RecordingRunner(config) if device == "cpu" else open_runner(config)
        self.runner = ForcedRunner(inner, NUM_KEPT)
        self.engine = WatchedEngine(config, self.runner, self.load)
        self.engine.scheduler.max_step_tokens = EXACT_ROWS

    def load(self, name: str) -> Weights:
        adapter = formats.load(ADAPTERS / name, self.runner.model_config.modules())
        packed: Weights = self.runner.pack(adapter)
        return packed

    def answers(self, requests: list[Request], size: int) -> list[list[int]]:
        """Greedy tokens of each request, `size` of them at once."""
        self.clear()
        for start in range(0, len(requests), size):
            self.engine.run_all(requests[start : start + size])
        errors = {key: end.error for key, end in self.engine.ends.items() if end.error}
        assert not errors
        return [self.engine.outputs[request.request_id, 0] for request in requests]

    def clear(self) -> None:
        self.engine.outputs.clear()
        self.engine.ends.clear()

    def choices(
        self, requests: list[Request], size: int, answers: list[list[int]] | None = None
    ) -> Choices:
        """What the model would choose after each part of `answers`, or of its own."""
        notes: Choices = {}
        self.runner.notes = notes
        self.runner.answers = dict(enumerate(answers or []))
        try:
            assert self.answers(requests, size) == (answers or own_tokens(notes, len(requests)))
        finally:
            self.runner.notes = None
        assert len(notes) == len(requests) * NUM_TOKENS
        return notes


def own_tokens(notes: Choices, count: int) -> list[list[int]]:
    return [[notes[i, place].token_id for place in range(NUM_TOKENS)] for i in range(count)]


@pytest.fixture(scope="module")
def cpu(smollm2: Path) -> Iterator[Side]:
    if len(NAMES) == 1:
        pytest.skip("the set of adapters written by PEFT is not here: set LORINER_TEST_ADAPTERS")
    side = Side(smollm2, "cpu")
    yield side
    side.engine.close()


@pytest.fixture(scope="module")
def gpu(smollm2: Path, cpu: Side) -> Iterator[Side]:
    side = Side(smollm2, "cuda")
    yield side
    side.engine.close()


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    """The canaries in the base's chat template."""
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    texts = [
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n"
        "<|im_start|>assistant\n"
        for text in CANARIES
    ]
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def make_requests(named: list[tuple[str | None, list[int]]]) -> list[Request]:
    made = []
    for i, (name, prompt) in enumerate(named):
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, seed=i)
        made.append(Request(str(i), tuple(prompt), params, name))
    return made


@pytest.fixture(scope="module")
def canaries(prompts: list[list[int]]) -> list[Request]:
    """Every prompt on the base and on every adapter, in this order."""
    return make_requests([(name, prompt) for name in NAMES for prompt in prompts])


@pytest.fixture(scope="module")
def expected(cpu: Side, canaries: list[Request]) -> Choices:
    return cpu.choices(canaries, MAX_ROWS)


@pytest.fixture(scope="module")
def found(gpu: Side, canaries: list[Request], expected: Choices) -> Choices:
    return gpu.choices(canaries, MAX_ROWS, own_tokens(expected, len(canaries)))


def rows_of(name: str | None, num_places: int) -> list[tuple[int, int]]:
    """The keys of one adapter's choices, up to `num_places` of each answer."""
    first = NAMES.index(name) * len(CANARIES)
    numbers = range(first, first + len(CANARIES))
    return [(i, place) for i in numbers for place in range(num_places)]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_cpus_but_for_bf16(
    name: str | None, expected: Choices, found: Choices
) -> None:
    keys = rows_of(name, NUM_KEPT)
    wanted, got = (
        torch.stack([logits for key in keys if (logits := side[key].logits) is not None])
        for side in (expected, found)
    )
    error = got - wanted
    relative, largest = float(error.norm() / wanted.norm()), float(error.abs().max())
    report(
        f"{name or 'base'}: logits are off by {relative:.4f} of their norm, "
        f"{largest:.3f} at most; they go from {wanted.min():.1f} to {wanted.max():.1f}"
    )
    assert len(wanted) == len(keys)
    assert relative <= MAX_RELATIVE and largest <= MAX_ABSOLUTE


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_the_cpus(name: str | None, expected: Choices, found: Choices) -> None:
    agreement = report_agreement(name or "base", rows_of(name, NUM_TOKENS), expected, found)
    assert agreement >= MIN_AGREEMENT_OF_ONE


def test_nearly_all_greedy_tokens_are_the_cpus(expected: Choices, found: Choices) -> None:
    assert report_agreement("all together", list(expected), expected, found) >= MIN_AGREEMENT


def report_agreement(
    what: str, keys: list[tuple[int, int]], expected: Choices, found: Choices
) -> float:
    flips = [key for key in keys if found[key].token_id != expected[key].token_id]
    agreement = 1 - len(flips) / len(keys)
    margins = sorted(expected[key].margin for key in flips)
    report(
        f"{what}: {agreement:.2%} of {len(keys)} tokens agree; the CPU's margin where "
        f"they do not: {' '.join(f'{margin:.3f}' for margin in margins)}"
    )
    return agreement


@pytest.fixture(scope="module")
def mixture(prompts: list[list[int]]) -> list[Request]:
    """As many requests as rows, neighbours on other adapters, the base among them."""
    return make_requests(list(islice(zip(cycle(NAMES), cycle(prompts), strict=False), MAX_ROWS)))


@pytest.fixture(scope="module")
def alone(gpu: Side, mixture: list[Request]) -> list[list[int]]:
    return gpu.answers(mixture, 1)


@pytest.mark.parametrize("size", [8, 32, MAX_ROWS])
def test_mixed_equals_alone(
    size: int, gpu: Side, mixture: list[Request], alone: list[list[int]]
) -> None:
    gpu.engine.max_mixed = 0
    assert gpu.answers(mixture, size) == alone
    assert gpu.engine.max_mixed == min(size, len(NAMES))


def test_a_request_keeps_its_tokens_while_others_come_and_go(
    gpu: Side, mixture: list[Request], alone: list[list[int]]
) -> None:
    """From one row to all and back, through every size of graph between."""
    gpu.clear()
    for request in mixture:
        gpu.engine.submit(request)
        gpu.engine.step()
    gpu.engine.run_all()
    found = [gpu.engine.outputs[request.request_id, 0] for request in mixture]
    changed = [i for i, tokens in enumerate(found) if tokens != alone[i]]
    report(f"coming and going: {len(changed)} of {len(mixture)} answers changed")
    assert not changed


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 24, 32, 48, MAX_ROWS])
def test_hardly_a_token_flips_in_another_bucket(
    size: int, gpu: Side, mixture: list[Request], alone: list[list[int]]
) -> None:
    choices = gpu.choices(mixture, size, alone)
    report_flips(f"{size} rows", choices, alone)


def test_hardly_a_token_flips_where_prefill_has_many_rows(
    gpu: Side, mixture: list[Request], alone: list[list[int]]
) -> None:
    """Such steps go through cuBLAS, whose order of sums is its own."""
    gpu.engine.scheduler.max_step_tokens = MANY_ROWS
    try:
        choices = gpu.choices(mixture, MAX_ROWS, alone)
    finally:
        gpu.engine.scheduler.max_step_tokens = EXACT_ROWS
    report_flips(f"prefill of {MANY_ROWS} rows", choices, alone)


def report(line: str) -> None:
    sys.stdout.write(f"\n{line}\n")


def report_flips(what: str, choices: Choices, alone: list[list[int]]) -> None:
    flips = [key for key in choices if choices[key].token_id != alone[key[0]][key[1]]]
    margins = " ".join(f"{choices[key].margin:.4f}" for key in flips)
    report(f"{what}: {len(flips)} of {len(choices)} tokens flipped; margins there: {margins}")
    assert len(flips) <= MAX_FLIPS * len(choices)
