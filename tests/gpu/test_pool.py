"""Adapter seats on a real device: bytes and pointers arrive, beside steps that still read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loriner.adapters.adapter import Adapter, LoraWeight
from loriner.adapters.gpu_pool import Arrange
from loriner.adapters.image import ENTRY, ImageLayout, SeatImage, pack_image
from loriner.adapters.pool import Pool
from tests.adapters.fake_device import Reader, expected, layout_of
from tests.adapters.samples import module_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODULES = module_table(512, 1024, 128, 4, 1000)
LAYOUT = ImageLayout(layout_of(MODULES), chunk_bytes=64 << 10)  # an image is several chunks


def adapter(seed: int, rank: int = 16) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    return Adapter.of(
        {
            n: LoraWeight(
                torch.randn(rank, k, generator=random).bfloat16(),
                torch.randn(o, rank, generator=random).bfloat16(),
                None,
                0.5 + seed,
            )
            for n, (o, k) in MODULES.items()
            if "layers" in n or n == "lm_head"
        }
    )


class Gpu:
    """A pool on the device and a count of what arrived."""

    def __init__(self, num_images: int, arrange: Arrange, max_seats: int = 8) -> None:
        from loriner.adapters.cuda_copies import cuda_seats, pinned_host

        self.arrived = threading.Semaphore(0)
        size = pack_image(adapter(0), LAYOUT).num_bytes
        self.host = pinned_host(16 * size)
        device = torch.device("cuda", 0)
        self.seats = cuda_seats(
            LAYOUT, num_images * size, max_seats, self.arrived.release, device, arrange
        )
        self.pool = Pool(self.seats, max_seats)

    def image(self, seed: int, rank: int = 16) -> SeatImage:
        return pack_image(adapter(seed, rank), LAYOUT, self.host.allocate)

    def reads(self, seat_id: int, wanted: Adapter) -> bool:
        """Follow the row's pointers, on copies of the device's memory."""
        memory = self.seats._slab.cpu()
        row = self.seats.table[seat_id].cpu()
        shift = memory.data_ptr() - self.seats._slab.data_ptr()
        entries = row.numpy().view(ENTRY)
        for field in ("a", "b", "bias"):
            there = entries[field] != 0
            entries[field][there] = (entries[field][there].astype("i8") + shift).astype("u8")
        reader = Reader(memory, row, LAYOUT, aligned=False)
        x = torch.randn(512)
        for layer in range(4):
            names = [f"model.layers.{layer}.self_attn.{p}_proj" for p in "qkv"]
            outs = [MODULES[name][0] for name in names]
            y, found = expected(wanted, names, x, outs), reader.linear(f"{layer}.qkv", x, outs)
            if not torch.linalg.norm(found - y) <= 1e-6 * torch.linalg.norm(y):
                return False
        return True


@pytest.fixture
def gpu(kernels: Any) -> Iterator[Gpu]:
    gpu = Gpu(3, kernels.tile_seat)
    yield gpu
    gpu.pool.close()


def arrive(gpu: Gpu, generation: str) -> None:
    deadline = time.monotonic() + 10
    while not gpu.pool.is_ready(generation):
        assert time.monotonic() < deadline, "the copy never came"
        assert gpu.arrived.acquire(timeout=10)


def test_pinned_memory_is_pinned_and_ours(gpu: Gpu) -> None:
    image = gpu.image(1)
    assert image.bytes.is_pinned()
    assert gpu.host.num_misses == 0


def test_images_and_rows_arrive(gpu: Gpu) -> None:
    for seed in range(3):
        gpu.pool.seat(f"{seed}", gpu.image(seed))
    for seed in range(3):
        arrive(gpu, f"{seed}")
        assert gpu.reads(gpu.pool.seat_id(f"{seed}"), adapter(seed))
    gpu.pool.check_integrity()


def test_images_are_split_over_what_is_free(gpu: Gpu) -> None:
    for seed in range(3):
        gpu.pool.seat(f"{seed}", gpu.image(seed))
        arrive(gpu, f"{seed}")
    gpu.pool.evict("0")
    gpu.pool.evict("2")
    gpu.pool.seat("wide", gpu.image(7, 24))
    arrive(gpu, "wide")
    assert gpu.reads(gpu.pool.seat_id("wide"), adapter(7, 24))
    assert gpu.reads(gpu.pool.seat_id("1"), adapter(1))


def test_a_replayed_step_reads_its_adapter_to_the_end(gpu: Gpu) -> None:
    """A long step reads a seat late, in a graph; its memory is given away meanwhile."""
    for seed in range(3):
        gpu.pool.seat(f"{seed}", gpu.image(seed))
        arrive(gpu, f"{seed}")
    seen = torch.empty_like(gpu.seats._slab)
    rows = torch.empty_like(gpu.seats.table)
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=side):
        torch.cuda._sleep(200_000_000)  # 100 ms
        seen.copy_(gpu.seats._slab)
        rows.copy_(gpu.seats.table)
    before, table = gpu.seats._slab.clone(), gpu.seats.table.clone()
    torch.cuda.synchronize()
    event = torch.cuda.Event()
    graph.replay()
    event.record()
    gpu.pool.note_launch(event)
    assert gpu.pool.seat("new", gpu.image(9)) == ["0"]
    assert not event.query(), "seating waited for the step"
    assert not gpu.pool.is_ready("new")
    arrive(gpu, "new")
    assert event.query()
    assert torch.equal(seen, before) and torch.equal(rows, table)
    assert gpu.reads(gpu.pool.seat_id("new"), adapter(9))
    assert gpu.reads(gpu.pool.seat_id("1"), adapter(1))


def test_a_copy_runs_beside_a_step(gpu: Gpu) -> None:
    gpu.pool.seat("warm", gpu.image(0))
    arrive(gpu, "warm")
    torch.cuda._sleep(2_000_000_000)  # about a second
    event = torch.cuda.Event()
    event.record()
    gpu.pool.note_launch(event)
    gpu.pool.seat("beside", gpu.image(1))  # its memory was never given up: no step to wait for
    arrive(gpu, "beside")
    assert not event.query(), "the copy waited for the step"
    torch.cuda.synchronize()


def test_seats_come_and_go(kernels: Any) -> None:
    gpu = Gpu(3, kernels.tile_seat, max_seats=4)
    try:
        images = [gpu.image(seed, 4 + 4 * (seed % 4)) for seed in range(8)]
        random = torch.Generator().manual_seed(3)
        for turn in range(300):
            seed = int(torch.randint(8, (1,), generator=random))
            if f"{seed}" not in gpu.pool:
                gpu.pool.seat(f"{seed}", images[seed])
                arrive(gpu, f"{seed}")
            event = torch.cuda.Event()
            event.record()
            gpu.pool.note_launch(event)
            if turn % 25 == 0:
                assert gpu.reads(gpu.pool.seat_id(f"{seed}"), adapter(seed, 4 + 4 * (seed % 4)))
            gpu.pool.check_integrity()
    finally:
        gpu.pool.close()
