"""How a linear is cut over thread blocks, and how much shared memory that takes: plain numbers.

The defines are `csrc/linear.cu`'s. Invariant: how the inputs are cut depends on the weight's shape
and the card, never on the number of rows or on adapters, so that a row's sums are added in the same
order in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from loriner.kernels.cuda.packing import BLOCK, TILE

KIND_F32, KIND_NESTED, KIND_BF16 = 0, 1, 2  # of weights
TOKEN_TILES = (1, 2, 3, 4, 6, 8, 12, 16)  # of 8 rows
MOST_TILES = 8  # of dense weights, or without wgmma: sums and weights share registers
MAX_RANK = 256  # of a slice
MAX_STACKED_RANK = 3 * MAX_RANK
STAGE_BLOCKS = 4  # KU of linear.cu
GROUP_ROWS = 4 * TILE
WEIGHT_STAGES = 2  # in shared memory: more hold up x and scales, which come behind them
WEIGHT_SLOT = STAGE_BLOCKS * BLOCK * TILE // 2  # bytes of such a stage
SMEM_TABLE = 65536
SMEM_CONTROL = 16 + 4 * 4 * 16  # epoch; two barriers of each group in each stage
LEAST_SHRUNK = 8 * MAX_STACKED_RANK * 4  # bytes: eight rows of the most ranks
PART = 2048  # inputs of A x that are summed apart from others, at most
SHARES = 16  # of such a part
BESIDE = (8, 4)  # warps that see to adapters while the others multiply one token tile, or two
PIECES = 2  # of a part, a unit each, where they do
BESIDE_TILES = len(BESIDE)  # up to which registers leave room for them
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
    def warps(self) -> int:
        return self.row_groups * self.input_groups * 4

    @property
    def threads(self) -> int:
        return self.warps * 32

    def sums(self, token_tiles: int) -> int:
        """Bytes of the groups' sums."""
        return self.input_groups * self.rows * token_tiles * 8 * 4

    def smem(self, kind: int, token_tiles: int, ring: Ring, ends: Ends | None = None) -> int:
        """Bytes of shared memory, of a kernel that sees to adapters or does not."""
        tokens = token_tiles * 8
        table = 0 if kind == KIND_BF16 else SMEM_TABLE
        x = table + ring.stages * self.input_groups * ring.blocks * tokens * 128
        x += ring.weights * self.warps * WEIGHT_SLOT
        sums = self.sums(token_tiles)
        front = max(x, LEAST_SHRUNK) + sums if ring.apart else max(x, sums + LEAST_SHRUNK)
        control = tokens * 96 + SMEM_CONTROL + ring.weights * self.warps * 8
        if ends is None:
            return front + control
        if not ends.beside:
            return max(front, (table if ends.keeps_table else 0) + ends.units) + control
        added = self.rows // self.cluster * tokens * 4
        return front + control + max(ends.units, added + LEAST_SHRUNK)


class Ends(NamedTuple):
    """How a kernel sees to adapters."""

    beside: int  # warps that do while the others multiply; 0: all do, before and after
    steps: int  # of 32 inputs of the longest unit of A x
    buffers: int  # for A of such a unit
    keeps_table: bool  # of the weights' values; else it is made when A x is done

    @property
    def units(self) -> int:
        """Bytes of shared memory."""
        shares = SHARES // (PIECES if self.beside else 1)
        return shares * 512 + self.buffers * 16 * (self.steps | 1) * 64


class Ring(NamedTuple):
    """How x passes through shared memory, and weights beside it."""

    blocks: int  # of 64 inputs of a group in one stage (XU)
    stages: int
    apart: bool  # sums have room beside it
    weights: int = 0  # stages of each warp's weights beside it; 0: they come to registers


_SIZES = ((4, 3), (4, 2), (2, 3), (2, 2), (1, 4), (1, 3), (1, 2))
RINGS = tuple(Ring(*size, apart) for size in _SIZES for apart in (True, False))
WEIGHT_RINGS = tuple(ring._replace(weights=WEIGHT_STAGES) for ring in RINGS)
WHOLE_STAGES = tuple(ring for ring in WEIGHT_RINGS if ring.blocks == STAGE_BLOCKS)


@cache
def ring_of(
    cut: Tiling,
    kind: int,
    token_tiles: int,
    max_smem: int,
    ends: Ends | None = None,
    *,
    is_wide: bool,
) -> Ring | None:
    """The deepest ring of x that fits a block's `max_smem` bytes: beside NF4 weights on their way,
    where bulk copies bring them (`is_wide`), else one that leaves room for the next kernel's
    block, if any does."""
    choices = [(max_smem // 2 - SMEM_RESERVED, RINGS), (max_smem, RINGS)]
    if is_wide and kind != KIND_BF16:
        # groups that split the inputs have an x each: in pieces it costs what the weights gain
        beside = WHOLE_STAGES if cut.input_groups > 1 else WEIGHT_RINGS
        choices.insert(0, (max_smem, beside))
    for limit, rings in choices:
        for ring in rings:
            if cut.smem(kind, token_tiles, ring, ends) <= limit:
                return ring
    return None


def resident_blocks(cut: Tiling, num_sms: int) -> int:
    """Thread blocks of a launch that a card holds at a time, for certain: those that others wait
    for must be among them. Two multiprocessors always make a cluster of two; the blocks of larger
    clusters lie in one group of multiprocessors each, whose sizes differ, with some left over."""
    if cut.cluster <= 2:
        return num_sms // cut.cluster * cut.cluster
    return max(cut.cluster, num_sms // 2 // cut.cluster * cut.cluster)


def num_parts(inputs: int) -> int:
    """Parts of the inputs over which A x is summed apart, each by a block."""
    return -(-inputs // PART)


def unit_steps(inputs: int, pieces: int) -> int:
    """Steps of 32 inputs of the longest unit of A x, where parts are cut into so many."""
    return -(-inputs // 32 // (num_parts(inputs) * pieces))


@cache
def ends_of(
    cut: Tiling, kind: int, inputs: int, token_tiles: int, max_smem: int, *, is_wide: bool
) -> Ends:
    """Warps beside the main ones for few rows, where they fit; as many buffers as do."""
    steps = unit_steps(inputs, 1)
    choices = [Ends(0, steps, 2, is_wide)] if cut.min_blocks == 1 else []
    if is_wide and cut.min_blocks == 1 and token_tiles <= BESIDE_TILES:
        choices.insert(0, Ends(BESIDE[token_tiles - 1], unit_steps(inputs, PIECES), 1, True))
    for ends in (*choices, Ends(0, steps, 1, is_wide)):
        if ring_of(cut, kind, token_tiles, max_smem, ends, is_wide=is_wide):
            return ends
    raise ValueError(f"{inputs} inputs: too many for {max_smem} bytes of shared memory.")


@cache
def token_tiles_of(cut: Tiling, kind: int, rows: int, max_smem: int, *, is_wide: bool) -> int:
    """Tiles of 8 rows in one pass (`is_wide`: by wgmma): as many as there are rows, or as fit."""
    most = TOKEN_TILES[-1] if is_wide and kind != KIND_BF16 else MOST_TILES
    fitting = [
        n for n in TOKEN_TILES if n <= most and ring_of(cut, kind, n, max_smem, is_wide=is_wide)
    ]
    return next((n for n in fitting if n * 8 >= rows), fitting[-1])


def _most_groups(cut: Tiling, groups: int, num_sms: int) -> int:
    """Row groups of the multiprocessor that has most."""
    blocks = -(-groups // cut.row_groups)
    return -(-blocks // num_sms) * cut.row_groups


def choose(
    outputs: int, inputs: int, num_sms: int, *, clusters: bool, is_wide: bool, is_nf4: bool = True
) -> Tiling:
    """Enough thread blocks for all multiprocessors (measured on Hopper)."""
    groups = -(-outputs // GROUP_ROWS)
    if groups >= 2 * num_sms:
        if not is_nf4 or not clusters:
            return Tiling(2, 1, 1, min_blocks=2)
        cuts = (Tiling(4, 1, 1), Tiling(3, 1, 1)) if is_wide else (Tiling(4, 1, 1),)
        return min(cuts, key=lambda cut: _most_groups(cut, groups, num_sms))
    cluster = 1
    while clusters and cluster < 4 and groups * cluster * 3 <= num_sms * 2:
        if inputs // BLOCK < 32 * cluster:
            break
        cluster *= 2
    return Tiling(1, 4, cluster)
