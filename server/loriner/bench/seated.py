"""Random adapters as one fused linear of some layers reads them, each row on its own: what the
engine's seats and batches make of them, without an engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from loriner.adapters.adapter import Adapter
from loriner.adapters.image import PAGE_BYTES, ImageLayout, pack_image
from loriner.adapters.pool import pack
from loriner.bench.kernel_ops import Fused, Surface
from loriner.bench.random_adapters import RandomAdapters
from loriner.engine.step_buffers import seats_of
from loriner.engine.step_input import Span
from loriner.kernels.operands import Segment
from loriner.model.config import ModelConfig
from loriner.model.transformer import layout

SLACK_BYTES = 1 << 20  # of a seat: chunks end in whole pages


class Calls(NamedTuple):
    """What the linears are called with, and whose memory that points into."""

    operands: list[Any]
    owner: object


def call_adapters(
    kernels: Surface,
    config: ModelConfig,
    adapters: RandomAdapters,
    fused: Fused,
    layers: Sequence[int],
    rows: int,
) -> Calls:
    """What `fused` of each of these layers is called with; row i uses adapter number i."""
    wanted = {f"model.layers.{layer}.{member}" for layer in layers for member in fused.members}
    some = [part_of(adapters.adapter(index), wanted) for index in range(rows)]
    groups = [f"{layer}.{fused.name}" for layer in layers]
    if kernels.on_gpu:
        return _on_gpu(kernels, config, some, groups)
    packed = [pack(adapter, layout(config), kernels.dtype) for adapter in some]
    segments = [
        [Segment(row, row + 1, one.groups[group]) for row, one in enumerate(packed)]
        for group in groups
    ]
    return Calls([kernels.ops.prepare_lora(each, rows) for each in segments], packed)


def part_of(adapter: Adapter, names: set[str]) -> Adapter:
    modules = {name: weight for name, weight in adapter.modules.items() if name in names}
    return Adapter(adapter.generation, modules)


def _on_gpu(
    kernels: Surface, config: ModelConfig, some: Sequence[Adapter], groups: Sequence[str]
) -> Calls:
    from loriner.adapters.cuda_copies import cuda_seats

    images = ImageLayout(layout(config))
    made = [pack_image(adapter, images) for adapter in some]
    slack = SLACK_BYTES + len(groups) * PAGE_BYTES
    num_bytes = sum(image.num_bytes + slack for image in made)
    device, arrange = kernels.device, kernels.ops.tile_seat
    seats = cuda_seats(images, num_bytes, len(made), lambda: None, device, arrange)
    for seat_id, image in enumerate(made):
        seats.place(seat_id, image)
    while not all(map(seats.is_ready, range(len(made)))):
        time.sleep(1e-3)
    seats.close()
    spans = tuple(Span(row, row + 1, str(row)) for row in range(len(made)))
    row_seat, items = (
        torch.from_numpy(values).to(kernels.device)
        for values in seats_of(spans, list(range(len(made))))
    )
    count = torch.tensor([len(items)], dtype=torch.int32, device=kernels.device)
    lora = kernels.ops.seat_lora(seats.table, row_seat, items, count)
    return Calls([lora.operand(group) for group in groups], seats)
