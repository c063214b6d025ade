"""The trainer's CUDA graphs: what a replay learns, what is captured, and what a failure leaves."""

from __future__ import annotations

import logging
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from loriner.train import qlora
from loriner.train.attention import Starts
from loriner.train.base import Base, open_base
from loriner.train.checkpoints import resume
from loriner.train.files import Settings
from loriner.train.graphs import Graphs
from loriner.train.job import Job
from loriner.train.lora import Lora
from loriner.train.masks import Document
from loriner.train.passes import Batch, Share, learn, learn_batch
from loriner.train.prepare import prepare
from loriner.train.settings import ALL_LINEAR, OPTIMIZERS, JobConfig, RunConfig
from tests.tiny import write_tiny_base
from tests.train.conftest import PIRATE, StopAfter
from tests.train.peft_oracle import gradients_of, off

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

# ||difference|| / ||gradient|| of a tensor between two runs of the same kernels in bf16: the
# backward of attention adds with atomics, in any order.
ATOMICS = 0.02
SHORT, LONG = (13, 5, 29, 6, 30), (200, 90, 256)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("graphs") / "tiny")


@pytest.fixture(scope="module")
def base(tiny: Path) -> Base:
    return open_base(RunConfig(base=tiny, device="cuda"))


def lora_of(base: Base, rank: int, dropout: float = 0.0) -> Lora:
    targets = base.config.linears_named(ALL_LINEAR)
    options: dict[str, Any] = {"dropout": dropout, "seed": rank, "device": base.device}
    lora = Lora(targets, rank=rank, scaling=8 / rank, **options)
    torch.manual_seed(rank)
    for _, b in lora.weights.values():
        b.copy_(torch.randn(b.shape) * 0.1)
    return lora


def share(lora: Lora, lengths: tuple[int, ...], seed: int) -> Share:
    random = torch.Generator().manual_seed(seed)
    documents = [
        Document(
            tuple(torch.randint(0, 256, (length,), generator=random).tolist()),
            tuple(i > length // 2 for i in range(length)),
        )
        for length in lengths
    ]
    weight = 1 / sum(d.num_learnt for d in documents)
    return Share(documents, lora, weight, seed=f"0 {seed} 0")


def taken(lora: Lora) -> dict[str, Tensor]:
    """Its gradients, which are zero from here on."""
    grads = {name: grad.clone() for name, grad in gradients_of(lora).items()}
    lora.gradient.zero_()
    return grads


def step(passes: Any, shares: list[list[Share]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Losses of passes that add up, and the gradients of each adapter."""
    losses = [own for one in shares for own in passes(one)]
    return losses, [taken(s.lora) for s in shares[0] if s.lora]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_in_one_launch_is_that_of_one_document_after_the_other(kv_heads: int) -> None:
    torch.manual_seed(0)
    device, lengths = torch.device("cuda"), (5, 130, 1, 64)
    plan = Starts.of(lengths, device, 16, 256)
    found = []
    for attend, dtype in ((plan.attend, torch.bfloat16), (plan._attend_each, torch.float32)):
        torch.manual_seed(1)
        states = [
            torch.randn(heads, sum(lengths), 16, device=device)
            .bfloat16()
            .to(dtype)
            .requires_grad_()
            for heads in (4, kv_heads, kv_heads)
        ]
        y = attend(0.3, 0.0, *states)
        weight = torch.randn(y.shape, device=device).bfloat16().to(dtype)
        found.append((y, *torch.autograd.grad((y * weight).sum(), states)))

    for one, exact in zip(*found, strict=True):
        assert (one.float() - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_replay_learns_what_an_eager_pass_learns(
    checkpointing: bool, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two adapters of different ranks, one with dropout, steps of two passes, two sizes in turn;
    each step's gradients against those of eager passes, padded alike and not padded at all."""
    run = RunConfig(base=tiny, device="cuda", gradient_checkpointing=checkpointing)
    base = open_base(run)
    exact_base = open_base(RunConfig(base=tiny, device="cuda", dtype="float32"))
    loras = [lora_of(base, 4), lora_of(base, 16, dropout=0.2)]
    graphs = Graphs(base)
    with caplog.at_level(logging.WARNING):
        for seed in range(5):
            lengths = LONG if seed % 2 else SHORT
            shares = [
                [share(lora, lengths, 10 * seed + 5 * i + j) for j, lora in enumerate(loras)]
                for i in range(2)
            ]
            losses, grads = step(graphs.learn, shares)
            _, padded = step(lambda one: Graphs(base).learn(one), shares)
            eager_losses, eager = step(lambda one: learn(base, one), shares)
            _, exact = step(lambda one: learn(exact_base, one), shares)
            for own, other in zip(losses, eager_losses, strict=True):
                torch.testing.assert_close(own, other, rtol=0.02, atol=0.05)
            for ours, same, unpadded, true in zip(grads, padded, eager, exact, strict=True):
                assert max(off(ours, same).values()) <= ATOMICS
                assert fmean(off(ours, true).values()) <= 1.25 * fmean(off(unpadded, true).values())

    assert "without CUDA graphs" not in caplog.text
    assert (len(graphs), graphs.num_passes, graphs.num_replays) == (2, 10, 8)


def test_weights_that_the_optimiser_changed_are_those_of_the_next_replay(base: Base) -> None:
    lora, graphs = lora_of(base, 8), Graphs(base)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(20):
        (own,) = graphs.learn([share(lora, SHORT, 0)])
        losses.append(own.mean().item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    assert graphs.num_replays == 19
    assert losses[-1] < 0.7 * losses[0]
    assert all(now < before + 0.05 for before, now in zip(losses[1:], losses[2:], strict=False))


def test_a_capture_that_fails_midway_leaves_the_device_usable(
    base: Base, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def waiting(base: Base, batch: Batch, shares: list[Share]) -> Tensor:
        losses = learn_batch(base, batch, shares)
        losses.sum().item()
        return losses

    stream, lora = torch.cuda.current_stream(), lora_of(base, 8)
    graphs, own = Graphs(base), share(lora, SHORT, 0)
    _, (expected,) = step(lambda one: learn(base, one), [[own]])
    monkeypatch.setattr("loriner.train.graphs.learn_batch", waiting)
    for _ in range(4):
        _, (found,) = step(graphs.learn, [[own]])
        assert fmean(off(found, expected).values()) <= ATOMICS

    assert torch.cuda.current_stream() == stream
    assert graphs.num_replays == 0
    assert len([r for r in caplog.records if "without CUDA graphs" in r.getMessage()]) == 1


def test_with_too_little_memory_for_both_graphs_give_way(
    base: Base, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("loriner.train.graphs._bytes_left", lambda: 0)
    graphs, own = Graphs(base), share(lora_of(base, 8), SHORT, 0)
    found = [graphs.learn([own])[0] for _ in range(3)]

    assert graphs.num_replays == len(graphs) == 0
    assert "no memory" in caplog.text
    torch.testing.assert_close(found[0], found[2], rtol=0.02, atol=0.02)


def states(job: Job) -> list[Tensor]:
    """Of the optimiser, on the host: paged ones are in no one place."""
    (state,) = job.optimizer.state.values()
    return [v.cpu() for _, v in sorted(state.items()) if isinstance(v, Tensor)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_goes_on_as_one_that_was_not_stopped(
    optimizer: str, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the bits where it was stopped; packed, two passes a step. Losses are not those of the
    run that was not stopped to the bit, as atomics add in any order. bitsandbytes pages what has
    100,000 elements."""
    made: list[Graphs] = []

    class Kept(Graphs):
        def __init__(self, base: Base) -> None:
            super().__init__(base)
            made.append(self)

    monkeypatch.setattr(qlora, "Graphs", Kept)

    def job_in(name: str) -> Job:
        options: dict[str, Any] = {"optimizer": optimizer, "steps": 12, "rank": 64}
        options |= {"batch": 2, "accumulation": 2, "packing": True, "max_length": 160}
        job = JobConfig(
            name="pirate", data=PIRATE, out=tmp_path / name, learning_rate=5e-3, **options
        )
        return prepare(Settings(RunConfig(base=base.path), (job,))).start(base)[0]

    straight, stopped = job_in("straight"), job_in("stopped")
    assert qlora.train(base, [straight], qlora.Silent())
    assert not qlora.train(base, [stopped], StopAfter(5))
    again = job_in("stopped")
    resume(again, base)
    assert torch.equal(again.lora.flat, stopped.lora.flat)
    assert again.lora.flat.numel() > 100_000
    assert all(map(torch.equal, states(again), states(stopped)))
    assert qlora.train(base, [again], qlora.Silent())

    losses = [[record.loss for record in job.steps] for job in (straight, again)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[0][-1] < losses[0][0]
    assert all(graphs.num_replays for graphs in made), "every run replays"
