"""The segmented linear and the flat pass: forward and gradients against PEFT, and each other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
import torch

from loriner.train.attention import Groups
from loriner.train.base import Base, open_base
from loriner.train.lora import Lora
from loriner.train.masks import Document
from loriner.train.passes import Share, learn, mean_loss, run_pass
from loriner.train.settings import ALL_LINEAR, RunConfig
from tests.tiny import write_tiny_base, write_tiny_dense
from tests.train.peft_oracle import gradients_of, off, peft_gradients

LENGTHS = (13, 5, 29, 6, 30)


@pytest.fixture(scope="module")
def base(tiny: Path) -> Base:
    return open_base(RunConfig(base=tiny, device="cpu"))


def make_lora(base: Base, rank: int = 4, seed: int = 0, **more: float) -> Lora:
    """Random A and B."""
    targets = base.config.linears_named(ALL_LINEAR)
    lora = Lora(targets, rank=rank, scaling=8 / rank, seed=seed, **more)  # type: ignore[arg-type]
    for _, b in lora.weights.values():
        b.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return lora


def documents(*lengths: int, seed: int = 0) -> list[Document]:
    random = torch.Generator().manual_seed(seed)
    return [
        Document(
            tuple(torch.randint(0, 256, (length,), generator=random).tolist()),
            tuple(i > length // 2 for i in range(length)),
        )
        for length in lengths
    ]


def gradients(base: Base, *shares: Share) -> list[dict[str, torch.Tensor]]:
    """The gradients of each share's adapter."""
    learn(base, shares)
    return [taken(share.lora) for share in shares if share.lora]


def taken(lora: Lora) -> dict[str, torch.Tensor]:
    """Its gradients, which are zero from here on."""
    grads = {}
    for name, (a, b) in lora.gradients.items():
        grads |= {f"{name} A": a.clone(), f"{name} B": b.clone()}
    lora.gradient.zero_()
    return grads


def loss_of(base: Base, rows: list[Document], lora: Lora) -> float:
    """The mean over the learnt tokens, which are learnt from."""
    (losses,) = learn(base, [Share(rows, lora, weight=1 / sum(r.num_learnt for r in rows))])
    return losses.mean().item()


def assert_close(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 2e-5
) -> None:
    assert one.keys() == other.keys()
    largest = max(tensor.abs().max() for tensor in one.values())
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_loss_and_gradients_are_those_of_peft(family: str, tmp_path: Path) -> None:
    folder = write_tiny_base(tmp_path / family, family=family)
    base = open_base(RunConfig(base=folder, device="cpu"))
    lora, rows = make_lora(base), documents(*LENGTHS)
    found = loss_of(base, rows, lora)
    ours = gradients_of(lora)

    loss, theirs = peft_gradients(folder, lora, rows, rank=4, alpha=8)

    assert found == pytest.approx(loss, rel=1e-5)
    assert_close(theirs, ours)


def test_in_bf16_gradients_are_as_near_to_f32_as_those_of_peft(tiny: Path) -> None:
    base = open_base(RunConfig(base=tiny, device="cpu", dtype="bfloat16"))
    lora, rows = make_lora(base), documents(*LENGTHS)
    found = loss_of(base, rows, lora)
    ours = gradients_of(lora)

    peft = partial(peft_gradients, tiny, lora, rows, rank=4, alpha=8)
    loss, exact = peft()
    _, theirs = peft(dtype=torch.bfloat16)
    assert found == pytest.approx(loss, rel=0.01)
    assert fmean(off(ours, exact).values()) <= 1.25 * fmean(off(theirs, exact).values())


def test_a_dense_base_is_trained_on_as_it_is(tmp_path: Path) -> None:
    base = open_base(RunConfig(base=write_tiny_dense(tmp_path / "dense"), device="cpu"))
    lora = make_lora(base)
    (grads,) = gradients(base, Share(documents(*LENGTHS), lora, weight=0.01))

    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_dropped_inputs_have_the_gradient_of_what_was_computed(base: Base) -> None:
    """A finite difference along A of one module, with the same elements dropped."""
    lora = make_lora(base, dropout=0.5)
    share = Share(documents(*LENGTHS), lora, weight=0.1, seed="3 0 0")
    (grads,) = gradients(base, share)
    name = "model.layers.0.mlp.up_proj"
    a = lora.weights[name][0]
    direction = grads[f"{name} A"] / grads[f"{name} A"].norm()
    losses = []
    for step in (1e-2, -1e-2):
        a += step * direction
        losses.append(run_pass(base, [share])[0].item())
        a -= step * direction

    slope = (losses[0] - losses[1]) / 2e-2
    assert slope == pytest.approx(grads[f"{name} A"].norm().item(), rel=0.02)
    other = Share(share.documents, lora, weight=0.1, seed="4 0 0")
    assert run_pass(base, [other])[0].item() != run_pass(base, [share])[0].item()


@pytest.mark.parametrize("popularity", ["distinct", "identical", "with the base"])
def test_many_adapters_at_once_get_the_gradients_they_get_alone(
    base: Base, popularity: str
) -> None:
    loras = [make_lora(base, rank, seed) for seed, rank in enumerate((1, 3, 8, 16))]
    if popularity == "identical":
        loras = [make_lora(base, 4, 7) for _ in range(4)]
    shares = [
        Share(documents(*LENGTHS[: 2 + i], seed=i), lora, weight=0.01)
        for i, lora in enumerate(loras)
    ]
    alone = [gradients(base, share)[0] for share in shares]
    if popularity == "with the base":
        plain = Share(documents(40, seed=9), None)
        shares.insert(1, plain)
    for together, expected in zip(gradients(base, *shares), alone, strict=True):
        assert_close(expected, together)


@pytest.mark.parametrize("lengths", [LENGTHS, (7, 7, 7), (40,)])
def test_packed_documents_do_not_see_each_other(base: Base, lengths: tuple[int, ...]) -> None:
    lora, rows = make_lora(base), documents(*lengths)
    _, (together,) = run_pass(base, [Share(rows, lora)])
    alone = [run_pass(base, [Share([row], lora)])[1][0] for row in rows]

    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    (packed,) = gradients(base, Share(rows, lora))
    single = [gradients(base, Share([row], lora))[0] for row in rows]
    summed = {name: sum(g[name] for g in single) for name in packed}
    assert_close(packed, summed)  # type: ignore[arg-type]


def test_checkpointed_gradients_are_the_same_bits(tiny: Path) -> None:
    plain = open_base(RunConfig(base=tiny, device="cpu"))
    checkpointed = open_base(RunConfig(base=tiny, device="cpu", gradient_checkpointing=True))
    share = Share(documents(*LENGTHS), make_lora(plain, dropout=0.3), seed="1 2 3", neftune=5.0)

    (kept,) = gradients(plain, share)
    (again,) = gradients(checkpointed, share)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_noise_on_embeddings_is_as_large_as_neftune_says(base: Base) -> None:
    from loriner.train.passes import _with_noise

    rows = documents(16, 64)
    share = Share(rows, None, seed="0 0 0", neftune=5.0)
    noise = _with_noise(torch.zeros(80, 64), [share])

    for part, length in ((noise[:16], 16), (noise[16:], 64)):
        bound = 5.0 / (length * 64) ** 0.5
        assert part.abs().max() <= bound
        assert part.abs().max() > 0.9 * bound
        assert part.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_a_plan_puts_every_row_back_in_its_place() -> None:
    plan = Groups.of((3, 7, 1, 6), torch.device("cpu"))

    assert plan.rows[plan.places].tolist() == list(range(17))
    assert plan.shapes == ((2, 7), (1, 3), (1, 1))
    assert plan.rows[: 2 * 7].tolist() == [*range(3, 10), *range(11, 17), 16]


def test_mean_loss_does_not_depend_on_how_the_rows_are_cut(base: Base) -> None:
    lora, rows = make_lora(base), documents(*LENGTHS)

    assert mean_loss(base, lora, rows, 30) == pytest.approx(mean_loss(base, lora, rows, 9999))
