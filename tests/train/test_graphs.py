"""Passes of one size as one graph: what they learn, when they are captured, and which stay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from loriner.train.attention import Groups, Starts
from loriner.train.base import Base, open_base
from loriner.train.graphs import IDLE, Graphs, Run
from loriner.train.lora import ALIGN, Lora
from loriner.train.padding import next_size, padding
from loriner.train.passes import Batch, Share, learn, learn_batch
from loriner.train.settings import RunConfig
from tests.tiny import write_tiny_base
from tests.train.test_lora import LENGTHS, assert_close, documents, make_lora, taken

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tiny: Path) -> Base:
    return open_base(RunConfig(base=tiny, device="cpu"))


class Again:
    """Stands for a capture: does the same again on the same tensors, and counts."""

    def __init__(self) -> None:
        self.num_captures = 0

    def __call__(self, run: Run) -> Run:
        self.num_captures += 1
        return run


Learn = Callable[[list[Share]], list[Tensor]]


def learnt(learn_: Learn, shares: list[Share]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    losses = learn_(shares)
    return losses, [taken(share.lora) for share in shares if share.lora]


def assert_learns_as_alone(base: Base, graphs: Graphs, shares: list[Share]) -> None:
    losses, grads = learnt(graphs.learn, shares)
    expected_losses, expected = learnt(lambda shares: learn(base, shares), shares)
    for own, other in zip(losses, expected_losses, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    for one, other_ in zip(expected, grads, strict=True):
        assert_close(one, other_)


def share_of(lora: Lora | None, *lengths: int, seed: int = 0, **more: float) -> Share:
    weight = 1 / (10 + seed)
    return Share(documents(*lengths, seed=seed), lora, weight, seed=f"{seed} 0 0", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_padded_pass_learns_what_the_pass_it_was_learns(
    family: str, checkpointing: bool, tmp_path: Path
) -> None:
    folder = write_tiny_base(tmp_path / family, family=family)
    run = RunConfig(base=folder, device="cpu", gradient_checkpointing=checkpointing)
    opened, again = open_base(run), Again()
    graphs, loras = Graphs(opened, again), [make_lora(opened, 4, 1), make_lora(opened, 8, 2)]
    for seed in range(4):
        shares = [
            share_of(loras[0], *LENGTHS[: 3 + seed % 2], seed=seed),
            share_of(None, 20, seed=seed),
            share_of(loras[1], 40, 50, seed=seed, neftune=5.0),
        ]
        assert_learns_as_alone(opened, graphs, shares)

    assert (again.num_captures, graphs.num_replays, graphs.num_passes) == (1, 3, 4)


def test_gradients_of_replayed_passes_add_up(base: Base) -> None:
    graphs, lora = Graphs(base, Again()), make_lora(base)
    passes = [[share_of(lora, *LENGTHS, seed=seed)] for seed in range(4)]
    for shares in passes:
        graphs.learn(shares)
    summed = taken(lora)
    alone = [learnt(lambda shares: learn(base, shares), shares)[1][0] for shares in passes]

    assert graphs.num_replays == 3
    assert_close({name: sum(one[name] for one in alone) for name in summed}, summed)  # type: ignore[misc]


def test_losses_of_a_replay_outlive_the_next(base: Base) -> None:
    lora, kept = make_lora(base), list[Tensor]()

    def record(run: Run) -> Run:
        static = torch.empty(64)

        def replay() -> Tensor:
            static.copy_(run())
            return static

        return replay

    graphs = Graphs(base, record)
    for seed in range(4):
        kept += graphs.learn([share_of(lora, *LENGTHS, seed=seed)])
    for seed, losses in enumerate(kept):
        (expected,) = learn(base, [share_of(lora, *LENGTHS, seed=seed)])
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def test_noise_is_the_same_whatever_follows_it(base: Base) -> None:
    share = share_of(None, *LENGTHS, neftune=5.0)
    alone, count = Batch.of(base, [share]).embedded, sum(LENGTHS)
    padded = Batch.of(base, [replace(share, padding=documents(40, seed=1))]).embedded
    quiet = Batch.of(base, [replace(share, neftune=0.0)]).embedded

    assert torch.equal(padded[:count], alone)
    assert len(padded) == count + 40 and not torch.equal(alone, quiet)


def test_a_replay_reads_weights_as_they_are_now(base: Base) -> None:
    graphs, lora = Graphs(base, Again()), make_lora(base)
    share = share_of(lora, *LENGTHS)
    for _ in range(2):
        graphs.learn([share])
    other = make_lora(base, seed=5)
    lora.load(other.tensors())
    taken(lora)

    _, (found,) = learnt(graphs.learn, [share])
    _, (expected,) = learnt(lambda shares: learn(base, shares), [share_of(other, *LENGTHS)])
    assert graphs.num_replays == 2
    assert_close(expected, found)


def test_other_adapters_and_other_sizes_are_other_graphs(base: Base) -> None:
    again = Again()
    graphs, loras = Graphs(base, again), [make_lora(base), make_lora(base)]
    for lora in loras:
        for lengths in ((30,), (30, 150), (100, 100)):
            for _ in range(2):
                graphs.learn([share_of(lora, *lengths)])

    assert again.num_captures == len(graphs) == graphs.num_replays == 6


def test_a_replay_drops_what_its_seed_says(base: Base) -> None:
    again, loras = Again(), [make_lora(base, dropout=0.5), make_lora(base, dropout=0.1)]
    graphs, losses = Graphs(base, again), set[float]()
    for seed in range(4):
        same = documents(*LENGTHS)
        shares = [Share(same, lora, 0.1, seed=f"{seed} {i}") for i, lora in enumerate(loras)]
        assert_learns_as_alone(base, graphs, shares)
        losses |= {float(own.sum()) for own in graphs.learn(shares)}
        [taken(lora) for lora in loras]

    assert again.num_captures == 1 and graphs.num_replays == 7
    assert len(losses) == 8


def test_what_cannot_be_captured_runs_eagerly_and_says_why_once(
    base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run: Run) -> Run:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs, lora = Graphs(base, refuse), make_lora(base)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert_learns_as_alone(base, graphs, [share_of(lora, *LENGTHS)])

    assert [record.message for record in caplog.records] == [
        "Passes run without CUDA graphs, more slowly: operation not permitted when stream is "
        "capturing"
    ]
    assert graphs.num_replays == 0


def test_a_pass_for_which_graphs_leave_no_memory_runs_without_them(
    base: Base, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graphs, lora = Graphs(base, Again()), make_lora(base)
    for _ in range(2):
        graphs.learn([share_of(lora, 30)])
    taken(lora)

    def short(base: Base, batch: Any, shares: Sequence[Share]) -> Tensor:
        if len(graphs):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return learn_batch(base, batch, shares)

    monkeypatch.setattr("loriner.train.graphs.learn_batch", short)
    assert_learns_as_alone(base, graphs, [share_of(lora, 200)])
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_graph_in_use_stays_and_an_idle_one_makes_room(base: Base) -> None:
    again, lora = Again(), make_lora(base)
    graphs = Graphs(base, again, limit=1)
    short, long = [share_of(lora, 30)], [share_of(lora, 100)]
    for shares in (short, short, long, long, short):
        graphs.learn(shares)
    assert (again.num_captures, graphs.num_replays) == (1, 2)

    for _ in range(IDLE + 1):
        graphs.learn(long)
    assert (again.num_captures, len(graphs)) == (2, 1)
    before = graphs.num_replays
    graphs.learn(short)
    assert graphs.num_replays == before


def test_a_base_on_the_cpu_has_no_graphs_of_its_own(base: Base) -> None:
    graphs, lora = Graphs(base), make_lora(base)
    for _ in range(3):
        graphs.learn([share_of(lora, *LENGTHS)])

    assert (graphs.num_replays, len(graphs)) == (0, 0)


@pytest.mark.parametrize("lengths", [(13, 5, 29), (2,), (512,), (600, 7), (64,) * 9, (700,) * 3])
def test_padding_fills_a_size_with_documents_that_learn_nothing(lengths: tuple[int, ...]) -> None:
    rows = documents(*lengths)
    (added,), sizes = padding([rows])
    filled = [*rows, *added]

    assert not any(any(document.is_learnt) for document in added)
    assert sizes.tokens == (sum(len(d.token_ids) for d in filled),)
    assert sum(lengths) <= sizes.tokens[0] <= max(sum(lengths) + 63, sum(lengths) * 1.125)
    assert max(len(d.token_ids) for d in filled) <= sizes.longest
    assert len(filled) <= sizes.num_documents < max(17, 2 * len(filled))
    assert sizes.num_learnt >= sum(d.num_learnt for d in rows)


def test_jobs_are_padded_to_the_largest_where_that_is_cheap() -> None:
    def tokens(*sums: int) -> tuple[int, ...]:
        return padding([documents(count) for count in sums])[1].tokens

    assert tokens(100, 300, 512) == (512, 512, 512)  # a small pass takes its launches anyway
    assert tokens(1000, 1100) == (1152, 1152)
    assert tokens(1000, 4000) == (1024, 4096)


def test_sizes_lie_evenly_between_powers_of_two() -> None:
    found = [next_size(n, 8) for n in (1, 64, 65, 512, 513, 1024, 1025)]

    assert found == [64, 64, 128, 512, 576, 1024, 1152]
    for octave in (9, 12, 20):
        span = range(2**octave + 1, 2 ** (octave + 1) + 1, 7)
        assert len({next_size(n, 8) for n in span}) == 8
        assert all(n <= next_size(n, 8) < n * 1.126 for n in span)


def test_both_plans_of_a_batch_mean_the_same_attention() -> None:
    lengths = (5, 12, 1, 12)
    states = [torch.randn(heads, 30, 16) for heads in (4, 2, 2)]
    grouped = Groups.of(lengths, CPU).attend(None, 0.0, *states)
    starts = Starts.of(lengths, CPU, 8, 128)

    torch.testing.assert_close(starts.attend(None, 0.0, *states), grouped)
    assert starts.starts.tolist() == [0, 5, 17, 18, 30, 30, 30, 30, 30]
    assert (starts.longest, Starts.of(lengths, CPU).longest) == (128, 12)


def test_eight_bit_states_of_an_adapters_tensors_are_those_of_each_alone(base: Base) -> None:
    """Bit for bit: tensors share no block, and what lies between them bears on nothing."""
    lora = make_lora(base, rank=3)
    start, mine = lora.flat.data_ptr(), list(lora.tensors().values())
    alone = [nn.Parameter(tensor.clone()) for tensor in mine]
    options = {"lr": 0.1, "weight_decay": 0.1, "min_8bit_size": 0}
    together = bitsandbytes.optim.AdamW8bit(lora.parameters(), **options)
    apart = bitsandbytes.optim.AdamW8bit(alone, **options)
    for seed in range(4):
        learn(base, [share_of(lora, *LENGTHS, seed=seed)])
        grads = [grad for pair in lora.gradients.values() for grad in pair]
        assert lora.gradient.norm() == pytest.approx(torch.cat([g.view(-1) for g in grads]).norm())
        for parameter, grad in zip(alone, grads, strict=True):
            parameter.grad = grad.clone()
        for optimizer in (together, apart):
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    assert all(map(torch.equal, mine, alone))
    assert all((tensor.data_ptr() - start) % (4 * ALIGN) == 0 for tensor in mine)
    assert lora.flat.data_ptr() == start and lora.flat.grad is lora.gradient
    assert lora.num_parameters == sum(tensor.numel() for tensor in mine) < lora.flat.numel()
