"""The trainer on a GPU: gradients in bf16 against PEFT in fp32, canaries served as they were
trained, and the memory that QLoRA promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loriner.adapters.names import parse_name
from loriner.bench.shapes import hf_config
from loriner.bench.train import OURS
from loriner.bench.worker import run_script
from loriner.cli import main
from loriner.commands.publish import publish_checked
from loriner.train.base import open_base
from loriner.train.lora import Lora
from loriner.train.masks import Document
from loriner.train.passes import Share, run_pass
from loriner.train.settings import ALL_LINEAR, RunConfig
from loriner.train.stored import StoreServed
from tests.tiny import write_tiny_base
from tests.train.peft_oracle import dense_model, with_lora

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
        b.data.normal_(0, 0.1)
    return lora


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 0.05)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_peft(
    dtype: str, tolerance: float, checkpointing: bool, tiny: Path
) -> None:
    settings = RunConfig(
        base=tiny, device="cuda", dtype=dtype, gradient_checkpointing=checkpointing
    )
    base = open_base(settings)
    lora, rows = random_lora(base), random_documents(13, 5, 29, 30, 30)
    num_learnt = sum(row.num_learnt for row in rows)
    total, _ = run_pass(base, [Share(rows, lora, weight=1 / num_learnt)])
    torch.autograd.backward(total)

    peft = with_lora(dense_model(tiny).cuda(), lora, rank=8, alpha=16)
    loss: Any = 0.0
    for row in rows:
        ids = torch.tensor([row.token_ids], device="cuda")
        labels = torch.where(torch.tensor([row.is_learnt], device="cuda"), ids, -100)
        loss += peft(input_ids=ids, labels=labels).loss * row.num_learnt / num_learnt
    loss.backward()

    assert total.item() == pytest.approx(loss.item(), rel=tolerance)
    found = dict(peft.named_parameters())
    for name, pair in lora.weights.items():
        for part, ours in zip("AB", pair, strict=True):
            theirs = found[f"base_model.model.{name}.lora_{part}.default.weight"].grad
            assert theirs is not None and ours.grad is not None
            off = (ours.grad - theirs).norm() / theirs.norm()
            assert off <= tolerance, (name, part, float(off))


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


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "limit"), [("llama-2-7b", 8 * GB), ("llama-2-70b", 48 * GB)])
def test_peak_memory_is_within_what_qlora_promises(shape: str, limit: int) -> None:
    """Rank 64 on all linears, length 512, batch 1, checkpointing (arXiv 2305.14314)."""
    job = {"shape": shape, "config": hf_config(shape), "device": "cuda", "seed": 0, "rank": 64}
    job |= {"length": 512, "batch": 1, "steps": 3, "threads": 0, "checkpointing": True, "jobs": 1}
    found = run_script(OURS, job)

    assert found["peak_bytes"] < limit
    assert all(torch.isfinite(torch.tensor(found["losses"])))
