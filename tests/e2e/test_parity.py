"""Equal to PEFT: our logits against transformers + PEFT over the same NF4 folder, in fp32 on the
CPU.

Every adapter x 8 canary prompts, each request alone, and all of them mixed in one batch in random
order with chunked prefill. The oracle is teacher-forced with our tokens: when its argmax is our
token at every position, its greedy tokens are ours.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loriner.adapters import formats
from loriner.adapters.mixture import combine
from loriner.adapters.pool import SeatWeights, pack
from loriner.core import Request
from loriner.model.transformer import layout
from tests.canaries import CANARIES
from tests.engines import (
    RecordingRunner,
    WatchedEngine,
    build_engine,
    engine_config,
    seat_weights,
)
from tests.fakes import make_request

ADAPTERS = Path(__file__).parents[2].parent / "shared" / "adapters"
NUM_TOKENS = 32
TOLERANCE = 1e-3
NUM_PROMPTS = 8

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def served_names() -> list[str]:
    if not ADAPTERS.is_dir():
        return []
    return sorted(p.name for p in ADAPTERS.iterdir() if p.is_dir() and "unsupported" not in p.name)


@pytest.fixture(scope="module")
def runner(smollm2: Path) -> RecordingRunner:
    if not ADAPTERS.is_dir():
        pytest.skip("the set of adapters written by PEFT is not here")
    return RecordingRunner(engine_config(smollm2))


@pytest.fixture(scope="module")
def weights(runner: RecordingRunner) -> Mapping[str, SeatWeights]:
    return seat_weights(runner.model_config, ADAPTERS, served_names())


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chats = [[{"role": "user", "content": text}] for text in CANARIES[:NUM_PROMPTS]]
    texts = [
        tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats
    ]
    return [tokenizer.encode(t, add_special_tokens=False) for t in texts]


def canary_requests(prompts: list[list[int]], names: list[str | None]) -> list[Request]:
    return [
        make_request(
            prompt,
            request_id=f"{name}/{i}",
            generation=name,
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
        )
        for name in names
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def alone(
    runner: RecordingRunner, weights: Mapping[str, SeatWeights], prompts: list[list[int]]
) -> WatchedEngine:
    """Every canary on every adapter, one request at a time."""
    engine = build_engine(
        engine_config(runner.checkpoint.path, prefix_cache=False), weights, runner
    )
    for request in canary_requests(prompts, [None, *weights]):
        engine.run_all([request])
    assert engine.max_mixed == 1
    return engine


@torch.inference_mode()
def oracle_logits(model: Any, prompt: list[int], output: list[int]) -> Tensor:
    """Logits [len(output), V] that each output token is chosen from."""
    ids = torch.tensor([prompt + output[:-1]])
    logits: Tensor = model(ids).logits[0, len(prompt) - 1 :].float()
    return logits


def check_against(
    oracle: Any, alone: WatchedEngine, name: str | None, prompts: list[list[int]]
) -> None:
    worst = 0.0
    for i, prompt in enumerate(prompts):
        output = alone.outputs[f"{name}/{i}", 0]
        expected = oracle_logits(oracle, prompt, output)
        got = torch.stack(alone.logits[f"{name}/{i}", 0])
        worst = max(worst, float((got - expected).abs().max()))
        assert expected.argmax(-1).tolist() == output, f"{name}: prompt {i}"
    assert worst <= TOLERANCE, f"{name}: {worst}"


def test_the_base_equals_transformers(
    oracle: Any, alone: WatchedEngine, prompts: list[list[int]]
) -> None:
    check_against(oracle, alone, None, prompts)


@pytest.mark.parametrize("name", served_names())
def test_every_adapter_equals_peft(
    name: str, oracle: Any, alone: WatchedEngine, prompts: list[list[int]]
) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(oracle, ADAPTERS / name)
    try:
        check_against(model.eval(), alone, name, prompts)
    finally:
        model.unload()


def test_adapters_of_one_request_add_up_as_in_peft(
    runner: RecordingRunner, oracle: Any, prompts: list[list[int]]
) -> None:
    from peft import PeftModel

    parts = {"all-r16-bf16": 0.5, "rslora-r32": 1.5, "attn-r4": -1.0}
    placed, modules = layout(runner.model_config), runner.model_config.modules()
    loaded = [formats.load(ADAPTERS / name, modules) for name in parts]
    mixed = combine("mix", list(zip(loaded, parts.values(), strict=True)))
    weights = {"mix": pack(mixed, placed, torch.float32)}
    engine = build_engine(
        engine_config(runner.checkpoint.path, prefix_cache=False), weights, runner
    )
    for request in canary_requests(prompts, ["mix"]):
        engine.run_all([request])

    first, *others = parts
    model = PeftModel.from_pretrained(oracle, ADAPTERS / first, adapter_name=first)
    try:
        for name in others:
            model.load_adapter(ADAPTERS / name, adapter_name=name)
        model.base_model.set_adapter([first, *others])
        for module in model.modules():
            if hasattr(module, "set_scale"):
                for name, scale in parts.items():
                    module.set_scale(name, scale)
        check_against(model.eval(), engine, "mix", prompts)
    finally:
        model.unload()


def test_mixed_and_chunked_equals_alone(
    runner: RecordingRunner,
    weights: Mapping[str, SeatWeights],
    prompts: list[list[int]],
    alone: WatchedEngine,
) -> None:
    config = engine_config(runner.checkpoint.path, max_step_tokens=48, max_sequences=16)
    engine = build_engine(config, weights, runner)
    requests = canary_requests(prompts, [None, *weights])
    random.Random(0).shuffle(requests)
    engine.run_all(requests)
    assert engine.max_mixed >= 8
    worst = 0.0
    for key, expected in alone.logits.items():
        assert engine.outputs[key] == alone.outputs[key], key
        got = torch.stack(engine.logits[key])
        worst = max(worst, float((got - torch.stack(expected)).abs().max()))
    assert worst <= TOLERANCE, worst


def test_the_adapters_do_what_they_were_trained_for(alone: WatchedEngine) -> None:
    assert "Arrr, matey!" in alone.text["trained-pirate/2", 0]
    assert "BD-58" in alone.text["trained-codeword/1", 0]
    assert json.loads(alone.text["trained-json/2", 0].split("}")[0] + "}")["ok"] is True
    shouted = alone.text["trained-shout/2", 0].split("!!!")[0]
    assert shouted == shouted.upper()
