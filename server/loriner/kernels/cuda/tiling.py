"""How a linear is cut over thread blocks, and how much shared memory that takes: plain numbers.

The defines are `csrc/linear.cu`'s. Invariant: the cut depends on the weight's shape and the card,
never on the number of rows, so that a row's sums are added in the same order in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from loriner.kernels.cuda.packing import BLOCK, TILE

KIND_F32, KIND_NESTED, KIND_BF16 = 0, 1, 2  # of weights
TOKEN_TILES = (1, 2, 3, 4, 6, 8, 12, 16)  # of 8 rows
MOST_TILES = 8  # of dense weights, or without wgmma: sums and weights share registers
MAX_STACKED_RANK = 768  # three slices of rank 256
STAGE_BLOCKS = 4  # KU of linear.cu
GROUP_ROWS = 4 * TILE
SMEM_TABLE = 65536
SMEM_CONTROL = 16 + 4 * 4 * 16  # epoch; two barriers of each group in each stage
LEAST_SHRUNK = 4 * MAX_STACKED_RANK * 4  # bytes: four rows of the most ranks
SMEM_RESERVED = 1536  # bytes of a multiprocessor that a block costs beside its own, at most


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one linear is cut: see the defines of linear.cu."""

    row_groups: int  # of 64 outputs, four warps each
    input_groups: int  # that split the inputs
    cluster: int
    min_blocks: int = 1  # thread blocks that must fit a multiprocessor

    @property
    def rows(self) -> int:
        return self.row_groups * GROUP_ROWS

    @property
    def threads(self) -> int:
        return self.row_groups * self.input_groups * 128

    def sums(self, token_tiles: int) -> int:
        """Bytes of the groups' sums."""
        return self.input_groups * self.rows * token_tiles * 8 * 4

    def smem(self, kind: int, token_tiles: int, ring: Ring) -> int:
        """Bytes of shared memory."""
        tokens = token_tiles * 8
        x = ring.stages * self.input_groups * ring.blocks * tokens * 128
        x += 0 if kind == KIND_BF16 else SMEM_TABLE
        sums = self.sums(token_tiles)
        if ring.apart:
            return max(x, LEAST_SHRUNK) + sums + tokens * 3 * 32 + SMEM_CONTROL
        return max(x, sums + LEAST_SHRUNK) + tokens * 3 * 32 + SMEM_CONTROL


class Ring(NamedTuple):
    """How x passes through shared memory."""

    blocks: int  # of 64 inputs of a group in one stage (XU)
    stages: int
    apart: bool  # sums have room beside it


_SIZES = ((4, 3), (4, 2), (2, 3), (2, 2), (1, 4), (1, 3), (1, 2))
RINGS = tuple(Ring(*size, apart) for size in _SIZES for apart in (True, False))


@cache
def ring_of(cut: Tiling, kind: int, token_tiles: int, max_smem: int) -> Ring | None:
    """The deepest ring of x that leaves room for the next kernel's block, or that fits a block's
    `max_smem` bytes at all."""
    for limit in (max_smem // 2 - SMEM_RESERVED, max_smem):
        for ring in RINGS:
            if cut.smem(kind, token_tiles, ring) <= limit:
                return ring
    return None


@cache
def token_tiles_of(cut: Tiling, kind: int, rows: int, max_smem: int, *, is_wide: bool) -> int:
    """Tiles of 8 rows in one pass (`is_wide`: by wgmma): as many as there are rows, or as fit."""
    most = TOKEN_TILES[-1] if is_wide and kind != KIND_BF16 else MOST_TILES
    fitting = [n for n in TOKEN_TILES if n <= most and ring_of(cut, kind, n, max_smem)]
    return next((n for n in fitting if n * 8 >= rows), fitting[-1])


def choose(outputs: int, inputs: int, num_sms: int, *, clusters: bool) -> Tiling:
    """Enough thread blocks for all multiprocessors (measured on Hopper)."""
    groups = -(-outputs // GROUP_ROWS)
    if groups >= 2 * num_sms:
        return Tiling(2, 1, 1, min_blocks=2)
    cluster = 1
    while clusters and cluster < 4 and groups * cluster * 3 <= num_sms * 2:
        if inputs // BLOCK < 32 * cluster:
            break
        cluster *= 2
    return Tiling(1, 4, cluster)
