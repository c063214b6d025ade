"""Several adapters as one: names, sums, and what stays as it was."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from loriner.adapters import mixture
from loriner.adapters.adapter import Adapter, LoraWeight
from loriner.adapters.mixture import Part, generation_of, parts_of
from tests.adapters.samples import TINY

DIGESTS = ("a" * 64, "b" * 64, "c" * 64)
scales = st.floats(-100, 100, allow_nan=False)


def adapter(
    names: list[str], rank: int, seed: int, scaling: float = 2.0, *, bias: bool = False
) -> Adapter:
    torch.manual_seed(seed)
    modules = {}
    for name in names:
        outputs, inputs = TINY[name]
        b = torch.randn(outputs, rank)
        offset = torch.randn(outputs) if bias else None
        modules[name] = LoraWeight(torch.randn(rank, inputs), b, offset, scaling)
    return Adapter.of(modules)


def delta(weight: LoraWeight, x: torch.Tensor) -> torch.Tensor:
    """What it adds to a linear's output, in f64."""
    y = weight.b.double() @ (weight.a.double() @ x)
    return weight.scaling * (y if weight.bias is None else y + weight.bias.double())


@given(parts=st.lists(st.tuples(st.sampled_from(DIGESTS), scales), min_size=2, max_size=3))
def test_a_mixture_is_named_by_its_parts_in_any_order(parts: list[tuple[str, float]]) -> None:
    made = [Part(*part) for part in parts]
    name = generation_of(made)
    assert sorted(parts_of(name)) == sorted(made)
    assert generation_of(made[::-1]) == name


def test_one_adapter_as_it_is_keeps_its_own_name() -> None:
    assert generation_of([Part(DIGESTS[0], 1.0)]) == DIGESTS[0]
    assert parts_of(DIGESTS[0]) == (Part(DIGESTS[0], 1.0),)
    assert generation_of([Part(DIGESTS[0], 0.5)]) != DIGESTS[0]


def test_deltas_add_up_where_both_have_a_module_and_where_one_has() -> None:
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
    embed = "model.embed_tokens"
    first = adapter([q, v, embed], 3, seed=1, bias=True)
    second = adapter([q], 5, seed=2, scaling=0.25)
    mixed = mixture.combine("mix", [(first, 0.5), (second, -2.0)])

    assert mixed.generation == "mix" and set(mixed.modules) == {q, v, embed}
    assert mixed.modules[q].rank == 8 and mixed.modules[v].rank == 3
    x = torch.randn(TINY[q][1], dtype=torch.float64)
    expected = 0.5 * delta(first.modules[q], x) - 2.0 * delta(second.modules[q], x)
    torch.testing.assert_close(delta(mixed.modules[q], x), expected)
    torch.testing.assert_close(delta(mixed.modules[v], x), 0.5 * delta(first.modules[v], x))


def test_numbers_stay_as_they_are_where_all_scale_alike() -> None:
    name = "model.layers.1.mlp.down_proj"
    parts = [adapter([name], rank, seed=rank) for rank in (2, 4)]
    half = [
        Adapter.of({name: LoraWeight(w.a.bfloat16(), w.b.bfloat16(), None, w.scaling)})
        for w in (part.modules[name] for part in parts)
    ]
    mixed = mixture.combine("mix", [(half[0], 0.5), (half[1], 0.5)]).modules[name]
    assert (mixed.a.dtype, mixed.b.dtype, mixed.scaling) == (torch.bfloat16, torch.bfloat16, 1.0)
    assert torch.equal(mixed.b, torch.cat([w.modules[name].b for w in half], dim=1))


def test_parts_are_read_one_by_one() -> None:
    name = "model.layers.0.mlp.up_proj"
    held = {digest: adapter([name], 2, seed=i) for i, digest in enumerate(DIGESTS)}
    generation = generation_of([Part(DIGESTS[0], 0.5), Part(DIGESTS[1], 1.0)])

    mixed = mixture.load(generation, held.__getitem__)

    assert mixed.modules[name].rank == 4
    assert mixture.load(DIGESTS[2], held.__getitem__) is held[DIGESTS[2]]
