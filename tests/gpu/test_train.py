"""The trainer on a GPU: gradients in bf16 against PEFT in fp32, canaries served as they were
trained, and the memory that QLoRA promises."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from loriner.adapters.names import parse_name
from loriner.bench.cost import SCRIPT, VARIANTS, Variant
from loriner.bench.dense_base import make_bases
from loriner.bench.shapes import hf_config
from loriner.bench.train import OURS
from loriner.bench.worker import run_script
from loriner.cli import main
from loriner.commands.publish import publish_checked
from loriner.train.base import open_base
from loriner.train.lora import Lora
from loriner.train.masks import Document
from loriner.train.passes import Share, learn
from loriner.train.settings import ALL_LINEAR, RunConfig
from loriner.train.stored import StoreServed
from tests.tiny import write_tiny_base, write_tiny_dense
from tests.train.peft_oracle import gradients_of, off, peft_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

PIRATE = Path(__file__).resolve().parents[1] / "data" / "train" / "pirate.jsonl"
GB = 10**9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("gpu") / "tiny")


def random_documents(*lengths: int) -> list[Document]:
    random = torch.Generator().manual_seed(0)
    return [
        Document(
            tuple(torch.randint(0, 256, (length,), generator=random).tolist()),
            tuple(i > length // 2 for i in range(length)),
        )
        for length in lengths
    ]


def random_lora(base: Any) -> Lora:
    lora = Lora(base.config.linears_named(ALL_LINEAR), rank=8, scaling=2.0, device=base.device)
    for _, b in lora.weights.values():
        b.normal_(0, 0.1)
    return lora


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_peft(dtype: str, checkpointing: bool, tiny: Path) -> None:
    """In bf16 as near to those in f32 as PEFT's in bf16 are."""
    settings = RunConfig(
        base=tiny, device="cuda", dtype=dtype, gradient_checkpointing=checkpointing
    )
    base = open_base(settings)
    lora, rows = random_lora(base), random_documents(13, 5, 29, 30, 30)
    (losses,) = learn(base, [Share(rows, lora, weight=1 / sum(r.num_learnt for r in rows))])
    found = losses.mean().item()
    ours = gradients_of(lora)

    peft = partial(peft_gradients, tiny, lora, rows, rank=8, alpha=16, device="cuda")
    loss, exact = peft()
    if dtype == "float32":
        assert found == pytest.approx(loss, rel=2e-3)
        assert max(off(ours, exact).values()) <= 2e-3
    else:
        _, theirs = peft(dtype=torch.bfloat16)
        assert found == pytest.approx(loss, rel=0.01)
        assert fmean(off(ours, exact).values()) <= 1.25 * fmean(off(theirs, exact).values())


def test_what_is_trained_on_the_gpu_is_served_as_it_was_trained(tiny: Path, tmp_path: Path) -> None:
    """In bf16, with an eight-bit paged optimiser and checkpointing; published twice."""
    flags = ["--base", str(tiny), "--device", "cuda", "--data", str(PIRATE), "--name", "pirate"]
    flags += [
        "--rank",
        "4",
        "--steps",
        "8",
        "--learning-rate",
        "2e-2",
        "--samples",
        "1",
        "--eval-split",
        "0.2",
    ]
    flags += ["--optimizer", "paged_adamw_8bit", "--gradient-checkpointing", "--max-length", "160"]
    store = tmp_path / "store"

    assert main(["train", *flags, "--out", str(tmp_path / "run"), "--store", str(store)]) == 0
    adapter = tmp_path / "run" / "adapter"
    with StoreServed(RunConfig(base=tiny, device="cuda"), store) as served:
        assert publish_checked(served, adapter, parse_name("again"), None)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.key)
def test_every_variant_of_bench_cost_learns(variant: Variant, tmp_path: Path) -> None:
    bases = make_bases(write_tiny_dense(tmp_path / "dense"), tmp_path / "bases")
    data = tmp_path / "rows.jsonl"
    answer = {"role": "assistant", "content": "yes"}
    rows = [[{"role": "user", "content": "x" * i}, answer] for i in range(1, 9)]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    job = {"variant": variant.key, "base": str(bases.folders[variant.base]), "test": str(data)}
    job |= {"device": "cuda", "dtype": "auto", "threads": 0, "max_rows": 0, "answer_rows": 3}
    rate = 3e-3 if variant.key == "full" else 2e-2
    settings = {"name": "x", "data": str(data), "batch": 4, "max_length": 64, "steps": 40}
    job |= {"metrics": ["exact"], "settings": settings | {"learning_rate": rate, "rank": 8}}
    found = run_script(SCRIPT, job)

    assert found["last_loss"] < 0.2 < found["first_loss"]
    assert found["right"]["exact"] >= 6


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "limit"), [("llama-2-7b", 8 * GB), ("llama-2-70b", 48 * GB)])
def test_peak_memory_is_within_what_qlora_promises(shape: str, limit: int) -> None:
    """Rank 64 on all linears, length 512, batch 1, checkpointing (arXiv 2305.14314)."""
    job = {"shape": shape, "config": hf_config(shape), "device": "cuda", "seed": 0, "rank": 64}
    job |= {"length": 512, "batch": 1, "steps": 3, "threads": 0, "checkpointing": True, "jobs": 1}
    found = run_script(OURS, job)

    assert found["peak_bytes"] < limit
    assert all(torch.isfinite(torch.tensor(found["losses"])))
