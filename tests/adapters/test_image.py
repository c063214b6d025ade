"""Images: read as kernels read them, every kind of adapter gives what its equation says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loriner.adapters import formats
from loriner.adapters.adapter import Adapter, LoraWeight
from loriner.adapters.image import ALIGNMENT, ENTRY, ImageLayout, can_tile, pack_image, plan, view
from loriner.errors import InvalidAdapterError
from loriner.kernels.cuda.tiling import MAX_RANK
from tests.adapters.fake_device import FUSED, Reader, expected, layout_of, slab, tensors
from tests.adapters.samples import PEFT_FOLDERS, SHARED, SMOLLM2, TINY

LAYOUT = ImageLayout(layout_of(TINY), page_bytes=256, chunk_bytes=2048)
SMALL = [f for f in sorted(PEFT_FOLDERS.glob("*-*")) if "unsupported" not in f.name]
SMALL += [PEFT_FOLDERS / "embed"]
REAL = [f for f in sorted(SHARED.glob("*")) if f.is_dir() and "unsupported" not in f.name]


def lora(rank: int, inputs: int, outputs: int, scaling: float = 1.0) -> LoraWeight:
    return LoraWeight(torch.randn(rank, inputs), torch.randn(outputs, rank), None, scaling)


def place(image_bytes: torch.Tensor, chunks: list[tuple[int, int]]) -> tuple[torch.Tensor, list]:  # type: ignore[type-arg]
    """Spread an image's chunks over a larger memory, last one first."""
    memory = slab(2 * len(image_bytes) + 256 * len(chunks))
    position, addresses = 256, [0] * len(chunks)
    for i in reversed(range(len(chunks))):
        start, end = chunks[i]
        memory[position : position + end - start] = image_bytes[start:end]
        addresses[i] = memory.data_ptr() + position
        position += end - start + 256
    return memory, addresses


def check(adapter: Adapter, modules: dict[str, tuple[int, int]], layout: ImageLayout) -> None:
    image = pack_image(adapter, layout)
    memory, addresses = place(image.bytes, list(image.plan.chunks))
    row = torch.from_numpy(image.plan.entries(addresses))
    assert row.shape == (len(layout.groups), ENTRY.itemsize)
    reader = Reader(memory, row, layout)
    reader.tile()  # as the device does
    for group in layout.groups:
        if group == "embed":
            continue
        layer, _, fused = group.partition(".")
        names = [f"model.layers.{layer}.{n}" for n in FUSED[fused]] if fused else [group]
        outs = [modules[name][0] for name in names]
        x = torch.randn(modules[names[0]][1])
        wanted = expected(adapter, names, x, outs)
        found = reader.linear(group, x, outs)
        assert torch.linalg.norm(found - wanted) <= 1e-6 * torch.linalg.norm(wanted)
    if weight := adapter.modules.get("model.embed_tokens"):
        vocab, hidden = modules["model.embed_tokens"]
        a, b = weight.a.bfloat16().double(), weight.b.bfloat16().double()
        for token in (0, 1, vocab - 1):
            found = reader.embedding(token, vocab, hidden)
            assert torch.allclose(found, weight.scaling * (b @ a[:, token]), rtol=1e-6)
    assert sum(t.nbytes for _, t in tensors(image)) == sum(
        t.numel() * (4 if role == "bias" else 2)
        for w in adapter.modules.values()
        for role, t in w.tensors.items()
    )


@pytest.mark.parametrize("folder", SMALL, ids=lambda f: f.name)
def test_every_kind_of_adapter_is_applied(folder: Path) -> None:
    check(formats.load(folder, TINY), TINY, LAYOUT)


@pytest.mark.parametrize("folder", REAL, ids=lambda f: f.name)
def test_adapters_of_a_real_base_are_applied(folder: Path) -> None:
    check(formats.load(folder, SMOLLM2), SMOLLM2, ImageLayout(layout_of(SMOLLM2)))


def test_slices_biases_and_ends_of_the_model() -> None:
    q, v = lora(3, 16, 16, 0.5), lora(1, 16, 8, -2.0)
    o = LoraWeight(torch.randn(5, 16), torch.randn(16, 5), torch.randn(16), 3.0)
    check(
        Adapter.of(
            {
                "model.layers.1.self_attn.v_proj": v,
                "model.layers.1.self_attn.q_proj": q,
                "model.layers.2.self_attn.o_proj": o,
                "model.layers.0.mlp.up_proj": lora(2, 16, 32),
                "lm_head": lora(7, 16, 48, 1.5),
                "model.embed_tokens": lora(2, 48, 16, 0.25),
            }
        ),
        TINY,
        LAYOUT,
    )


def test_groups_are_in_the_order_of_the_table() -> None:
    layers = [f"{i}.{g}" for i in range(3) for g in ("qkv", "o", "gate_up", "down")]
    assert LAYOUT.groups == (*layers, "lm_head", "embed")
    many = {f"{i}.qkv": None for i in range(12)}
    layout = ImageLayout({g: p for g, p in layout_of(TINY).items() if p.group not in many})
    assert layout.groups[0] == "0.o"


def test_ranks_end_where_slices_do_and_absent_ones_have_none() -> None:
    weight = {"model.layers.0.self_attn.k_proj": lora(3, 16, 8)}
    made = pack_image(Adapter.of(weight), LAYOUT).plan
    assert made.rank_ends[0].tolist() == [0, 3, 3]
    assert made.scales[0].tolist() == [0.0, 1.0, 0.0]


def test_tensors_are_aligned_chunks_are_pages_and_nothing_overlaps() -> None:
    names = [n for n in TINY if "layers" in n]
    adapter = Adapter.of({n: lora(3, TINY[n][1], TINY[n][0]) for n in names})
    image = pack_image(adapter, LAYOUT)
    offsets = image.plan.offsets[image.plan.offsets >= 0]
    assert (offsets % ALIGNMENT == 0).all()
    chunks = image.plan.chunks
    assert len(chunks) > 1 and chunks[0][0] == 0 and chunks[-1][1] == image.num_bytes
    assert all(a[1] == b[0] for a, b in zip(chunks, chunks[1:], strict=False))
    assert all(end % LAYOUT.page_bytes == 0 for _, end in chunks)
    spans = sorted((p.offset, p.offset + p.num_bytes) for p in image.plan.places.values())
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    for group, chunk in enumerate(image.plan.chunk_of):
        start, end = chunks[chunk]
        inside = image.plan.offsets[group][image.plan.offsets[group] >= 0]
        assert ((inside >= start) & (inside < end)).all()


def test_b_goes_into_tiles_where_its_sizes_allow_it() -> None:
    """The seat's entry says so by slice; the image has B as it is."""
    q, k, v = lora(8, 16, 16), lora(8, 16, 8), lora(6, 16, 16)
    parts = {f"model.layers.0.self_attn.{n}_proj": w for n, w in zip("qkv", (q, k, v), strict=True)}
    image = pack_image(Adapter.of(parts), LAYOUT)
    entries = image.plan.entries([0] * len(image.plan.chunks)).view(ENTRY).reshape(-1)
    assert entries["tiled"][LAYOUT.groups.index("0.qkv")] == 0b001
    for name, weight in parts.items():
        stored = view(image.bytes, image.plan.places[name, "b"])
        assert torch.equal(stored, weight.b.bfloat16()), name
    assert can_tile(16, MAX_RANK) and not can_tile(16, MAX_RANK + 4)  # more find no room there


@pytest.mark.parametrize(
    "weight",
    [
        LoraWeight(torch.ones(1, 16), torch.ones(16, 1), torch.full((16,), 3e38), 64.0),
        LoraWeight(torch.full((1, 16), 3.4e38), torch.ones(16, 1), None, 1.0),
        LoraWeight(torch.ones(1, 16), torch.full((16, 1), float("nan")), None, 1.0),
        LoraWeight(torch.zeros(1, 16), torch.zeros(16, 1), None, 1e39),
    ],
    ids=["scaled bias", "beyond bf16", "nan", "scale beyond f32"],
)
def test_what_is_not_finite_on_the_gpu_is_refused(weight: LoraWeight) -> None:
    with pytest.raises(InvalidAdapterError, match="finite"):
        pack_image(Adapter.of({"model.layers.0.self_attn.o_proj": weight}), LAYOUT)


def test_the_same_form_is_planned_the_same() -> None:
    one, two = (pack_image(Adapter.of({"lm_head": lora(2, 16, 48)}), LAYOUT).plan for _ in range(2))
    assert one.places == two.places and one.chunks == two.chunks
    assert plan({}, LAYOUT).num_bytes == 0
