"""NF4 and bf16 weights in the order in which `csrc/linear.cu` reads them, and back.

Plain tensor moves on any device; bytes are moved, none is changed. A tile is the 16 outputs of a
warp, a block 64 inputs: four 16 x 16 matrix fragments, of which lane (g, t) holds outputs g and
g + 8 and inputs 2t, 2t + 1, 2t + 8, 2t + 9 (PTX ISA, mma.m16n8k16 and wgmma, fragment of A).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loriner.kernels.operands import Nf4

BLOCK = 64
TILE = 16


class Nested(NamedTuple):
    """Scales as the kernel recomputes them: map[indexes] * outer + offset, rounded twice."""

    indexes: Tensor  # [tiles, KB / 4, 16, 4] u8
    outer: Tensor  # [tiles, spans, 16] f32
    offset: Tensor  # [tiles, 16] f32
    span_shift: int  # a span is 1 << span_shift blocks


def interleave(rows: Tensor, *, gated: bool) -> Tensor:
    """[gate | up] [N, C] -> 8 rows of gate, their 8 rows of up, and so on; others unchanged."""
    if not gated:
        return rows
    gate, up = rows.view(2, -1, 8, rows.shape[1])
    return torch.stack((gate, up), dim=1).view(rows.shape)


def deinterleave(rows: Tensor, *, gated: bool) -> Tensor:
    """Undoes `interleave`."""
    if not gated:
        return rows
    return rows.view(-1, 2, 8, rows.shape[1]).transpose(0, 1).reshape(rows.shape)


def pad_rows(rows: Tensor, multiple: int) -> Tensor:
    """Zero rows behind the last, to a multiple."""
    return F.pad(rows, (0, 0, 0, -len(rows) % multiple))


def pack_codes(packed: Tensor) -> Tensor:
    """bitsandbytes' bytes [N, K/2] u8 (N a multiple of 16) -> [tiles, KB, 512] u8.

    A byte there has its first element in the high nibble; here in the low one, as bf16 pairs lie.
    """
    swapped = (packed << 4) | (packed >> 4)
    n, half_k = packed.shape
    # tile, h, g, block, k16, k8, t -> tile, block, g, t, k16, k8, h
    split = swapped.view(n // TILE, 2, 8, half_k * 2 // BLOCK, 4, 2, 4)
    return split.permute(0, 3, 2, 6, 4, 5, 1).reshape(n // TILE, -1, 512)


def unpack_codes(codes: Tensor) -> Tensor:
    """Undoes `pack_codes`: [tiles, KB, 512] -> [N, K/2]."""
    tiles, blocks = codes.shape[:2]
    split = codes.view(tiles, blocks, 8, 4, 4, 2, 2)
    moved = split.permute(0, 6, 2, 1, 4, 5, 3).reshape(tiles * TILE, blocks * BLOCK // 2)
    return (moved << 4) | (moved >> 4)


def pad_inputs(rows: Tensor, multiple: int) -> Tensor:
    """Zero columns behind the last, to a multiple."""
    return F.pad(rows, (0, -rows.shape[1] % multiple))


def pack_rows(rows: Tensor) -> Tensor:
    """[N, C] -> [tiles, C, 16]: a lane's two outputs, g and g + 8, side by side."""
    split = rows.view(-1, 2, 8, rows.shape[1])
    return split.permute(0, 3, 2, 1).reshape(len(split), -1, TILE)


def pack_scales(scales: Tensor) -> Tensor:
    """[N, KB] (KB a multiple of 4) -> [tiles, KB / 4, 16, 4]: as `pack_rows`, four blocks of an
    output side by side."""
    packed = pack_rows(scales)
    return packed.view(len(packed), -1, 4, TILE).transpose(2, 3)


def pack_bf16(weight: Tensor) -> Tensor:
    """[N, K] bf16 (N a multiple of 16, K of 64) -> [tiles, KB, 1024]: a lane's 16 bytes for each of
    the four fragments of a block."""
    n, k = weight.shape
    # tile, h, g, block, k16, k8, t, e -> tile, block, k16, g, t, k8, h, e
    split = weight.view(n // TILE, 2, 8, k // BLOCK, 4, 2, 4, 2)
    return split.permute(0, 3, 4, 2, 6, 5, 1, 7).reshape(n // TILE, -1, 1024)


def unpack_bf16(weight: Tensor) -> Tensor:
    """Undoes `pack_bf16`."""
    tiles, blocks = weight.shape[:2]
    split = weight.view(tiles, blocks, 4, 8, 4, 2, 2, 2)
    return split.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(tiles * TILE, blocks * BLOCK)


def nested_span(parts: Sequence[Nf4], blocks: int) -> int:
    """Blocks of one row, from a multiple of them on, whose nested scales share their scale."""
    if any(p.nested is None for p in parts):
        return 0
    first = parts[0].nested
    assert first is not None
    if not all(p.nested is not None and torch.equal(p.nested.code, first.code) for p in parts):
        return 0
    span = 1
    while span < 256 and blocks % (span * 2) == 0:
        span *= 2
    return span


def pack_nested(
    parts: Sequence[Nf4], span: int, multiple: int, place: torch.device, *, gated: bool
) -> Nested:
    indexes, outers, offsets = [], [], []
    for part in parts:
        assert part.nested is not None
        outputs, blocks = part.shape[0], part.shape[1] // BLOCK
        indexes.append(part.nested.index.to(place).view(outputs, blocks))
        starts = torch.arange(0, outputs * blocks, span, device=place)
        outer = part.nested.absmax.to(place)[starts // 256]
        outers.append(outer.view(outputs, blocks // span))
        offsets.append(torch.full((outputs, 1), part.nested.offset, device=place))

    def fused(rows: Sequence[Tensor]) -> Tensor:
        joined = interleave(torch.cat(list(rows)), gated=gated)
        return pad_rows(joined, multiple)

    index = pack_scales(fused(indexes)).contiguous()
    offset = pack_rows(fused(offsets))[:, 0].contiguous()
    outer = pack_rows(fused(outers)).contiguous()
    return Nested(index, outer, offset, span.bit_length() - 1)
