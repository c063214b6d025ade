"""Whole bases on the GPU: logits and tokens against the fp32 CPU engine, alone and mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loriner.adapters.adapter import Adapter, LoraWeight
from loriner.core import Request, SamplingParams
from loriner.engine.cpu_runner import CpuRunner
from loriner.engine.runner import open_runner
from tests.engines import WatchedEngine, build_engine, engine_config
from tests.fakes import make_request
from tests.tiny import VOCAB_SIZE, write_tiny_base

pytestmark = pytest.mark.gpu

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 256}


NUM_NEW = 24


def run(
    model: Path,
    device: str,
    prompts: list[list[int]],
    *,
    together: bool = True,
    num_new: int = NUM_NEW,
    **settings: Any,
) -> list[list[int]]:
    """Greedy tokens of each prompt, in one batch or one after another."""
    engine = engine_on(model, device, {}, **settings)
    sampling = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
    requests = [Request(str(i), tuple(p), sampling) for i, p in enumerate(prompts)]
    for some in [requests] if together else [[request] for request in requests]:
        engine.run_all(some)
    engine.close()
    return [engine.outputs[str(i), 0] for i in range(len(prompts))]


def engine_on(
    model: Path, device: str, adapters: dict[str, Adapter], **settings: Any
) -> WatchedEngine:
    usual: dict[str, Any] = {"max_model_len": 256, "max_step_tokens": 64}
    config = engine_config(
        model,
        device=device,
        kv_bytes=32 << 20,
        pool_bytes=16 << 20,
        host_bytes=16 << 20,
        **usual | settings,
    )
    runner = CpuRunner(config) if device == "cpu" else open_runner(config)
    weights = {name: runner.pack(adapter) for name, adapter in adapters.items()}
    return build_engine(config, weights, runner)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "gemma"])
def test_greedy_tokens_agree_with_the_cpu_and_with_themselves(tmp_path: Path, family: str) -> None:
    overrides: dict[str, Any] = {**SIZES, "intermediate_size": 512}
    base = tmp_path / "base"
    write_tiny_base(base, family=family, **overrides)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist()
        for n in (1, 3, 17, 40, 90, 5, 64, 33)
    ]

    mixed = run(base, "cuda", prompts)
    assert mixed == run(base, "cuda", prompts, together=False)

    # The next token after each part of the CPU's answers: one flip does not make the rest differ.
    answers = run(base, "cpu", prompts)
    parts = [p + a[:i] for p, a in zip(prompts, answers, strict=True) for i in range(NUM_NEW)]
    found = [token for (token,) in run(base, "cuda", parts, num_new=1)]
    same = sum(a == b for a, b in zip(found, [t for a in answers for t in a], strict=True))
    assert same / len(parts) >= 0.95, same  # random weights tie often


def test_linears_kept_in_bf16_change_no_token(tmp_path: Path) -> None:
    """Prompts that go through cuBLAS, with their weights made for each step and kept."""
    base = tmp_path / "base"
    longest: dict[str, Any] = {"max_position_embeddings": 1024}
    write_tiny_base(base, family="llama", **SIZES, **longest, intermediate_size=512)
    prompts = [torch.randint(0, VOCAB_SIZE, (n,)).tolist() for n in (700, 300, 520)]
    sizes = {"max_model_len": 1024, "max_step_tokens": 600}

    made = run(base, "cuda", prompts, **sizes)

    assert run(base, "cuda", prompts, **sizes, bf16_shadow=True) == made


@pytest.mark.timeout(120)
def test_a_prompt_is_read_through_an_adapter_of_the_lm_head(tmp_path: Path) -> None:
    """Which the seat of the prompt's own rows tells, apart from those of the step."""
    base = tmp_path / "base"
    write_tiny_base(base, **SIZES, intermediate_size=512)
    prompt = torch.randint(0, VOCAB_SIZE, (90,)).tolist()
    factors = torch.randn(24, SIZES["hidden_size"]) / 16, torch.randn(VOCAB_SIZE, 24)
    adapter = Adapter.of({"lm_head": LoraWeight(*factors, None, 1.0)})

    found, expected, plain = (
        prompt_logprobs(base, device, prompt, adapter, generation)
        for device, generation in (("cuda", "g"), ("cpu", "g"), ("cpu", None))
    )

    assert abs(found - expected).mean() < abs(plain - expected).mean() / 20


def prompt_logprobs(
    base: Path, device: str, prompt: list[int], adapter: Adapter, generation: str | None
) -> np.typing.NDArray[np.float64]:
    """Of all tokens but the first."""
    engine = engine_on(base, device, {"g": adapter})
    engine.submit(make_request(prompt, generation=generation, prompt_logprobs=0))
    told = []
    while engine.has_work:
        told += [one for event in engine.step() for one in event.prompt_logprobs]
    engine.close()
    return np.array([one.logprob for one in told[1:]])
