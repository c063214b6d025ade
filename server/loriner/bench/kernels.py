"""`loriner bench kernels`: each op alone, against its bytes and a float64 result.

Launches go over weights that do not fit the L2 cache together, captured once and replayed.
Invariant: an op whose result is wrong is reported as wrong, never by its time alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from loriner.bench import options

if TYPE_CHECKING:
    from torch import Tensor

    from loriner.bench.figures import Figures, Limits
    from loriner.bench.kernel_ops import Fused, Surface
    from loriner.bench.random_base import RandomBase
    from loriner.bench.timing import Stopwatch

LINEAR_HEAD = (
    "linear",
    "rows",
    "us",
    "bytes us",
    "of read",
    "error",
    "bitsandbytes us",
    "bf16 us",
)
OP_HEAD = ("op", "of", "us", "bytes us", "of read")
COLD_BYTES = 256 << 20  # of operands in one round: several times any L2 cache
MAX_OPERANDS = 32
PEERS = ("bitsandbytes", "bf16")


def add_command(subparsers: options.Parsers) -> None:
    parser = options.add_parser(
        subparsers,
        "kernels",
        run,
        "each kernel alone, beside its bytes, bitsandbytes and cuBLAS",
        "The four NF4 linears of a layer, cold: microseconds of one launch in a replayed round over"
        " different weights; relative error ||y - y64|| / ||y64|| against float64 on the NF4"
        " values, from poisoned outputs; bitsandbytes' matmul_4bit where it is installed, and"
        " torch's bf16 matmul. Then the other kernels of a step.",
    )
    options.add_rows(parser, "1,8,16,32,64,128,512")
    options.add_ranks(parser)
    parser.add_argument("--context", type=int, default=1024, help="of attention (default: 1024)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds timed (default: 20)")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        default=list(PEERS),
        help="what to measure beside (default: both)",
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """One linear, or the four of a layer together."""

    linear: str
    rows: int
    us: float
    num_bytes: int  # weights as stored, inputs, outputs
    floor_us: float
    error: float
    peers: dict[str, float]  # microseconds


def run(args: argparse.Namespace) -> int:
    options.require_device(args)
    from loriner.bench.figures import Figures
    from loriner.bench.random_base import RandomBase

    base = RandomBase(args.shape, args.device, seed=args.seed)
    figures = Figures(args)
    limits = figures.measure_limits()
    measured = measure_linears(args, base, limits, figures)
    figures.table(LINEAR_HEAD, [cells(one) for one in measured])
    measure_others(args, base, limits, figures)
    return 0


def measure_linears(
    args: argparse.Namespace,
    base: RandomBase,
    limits: Limits,
    figures: Figures,
) -> list[Measured]:
    from loriner.bench.kernel_ops import LINEARS, Surface

    kernels = Surface(base, args.threads)
    found: list[Measured] = []
    for fused in LINEARS:
        bench = _LinearBench(fused, base, kernels, figures.watch, limits)
        found += bench.measure(args.rows, args.peers, args.repeats)
    for rows in args.rows:
        found.append(total([one for one in found if one.rows == rows]))
    for one in found:
        figures.record("linear", {"shape": args.shape, **asdict(one)})
    return found


class _LinearBench:
    """One fused linear over operands that are not in the cache."""

    def __init__(
        self,
        fused: Fused,
        base: RandomBase,
        kernels: Surface,
        watch: Stopwatch,
        limits: Limits,
    ) -> None:
        from loriner.bench.traffic import nf4_bytes

        self.fused, self.base, self.kernels = fused, base, kernels
        self.watch, self.limits = watch, limits
        self.outputs, self.inputs = fused.shape(base)
        self.weight_bytes = nf4_bytes(self.outputs * self.inputs)

    def measure(
        self, all_rows: Sequence[int], peers: Sequence[str], repeats: int
    ) -> list[Measured]:
        us = self._ours(all_rows, repeats)
        beside = {peer: self._peer(peer, all_rows, repeats) for peer in peers}
        found = []
        for rows in all_rows:
            num_bytes = self._num_bytes(rows)
            found.append(
                Measured(
                    self.fused.name,
                    rows,
                    us[rows],
                    num_bytes,
                    1e3 * self.limits.floor_ms(num_bytes),
                    self._error(rows),
                    {peer: times[rows] for peer, times in beside.items() if rows in times},
                )
            )
        return found

    def _ours(self, all_rows: Sequence[int], repeats: int) -> dict[int, float]:
        operands = [
            self.kernels.prepare(self.fused, self.fused.weights(self.base, layer))
            for layer in range(self._count(self.weight_bytes))
        ]

        times = {}
        for rows in all_rows:
            x = self.kernels.random(rows, self.inputs)
            h = self.kernels.residual(self.fused, rows, self.outputs)
            launches = [partial(self.kernels.launch, self.fused, x, o, h) for o in operands]
            times[rows] = self.watch.each_us(launches, repeats=repeats)
        return times

    def _peer(self, peer: str, all_rows: Sequence[int], repeats: int) -> dict[int, float]:
        """Empty when the peer is not installed."""
        import torch

        from loriner.bench.kernel_ops import Bitsandbytes, dequantized

        def as_bf16(weights: Sequence[Any]) -> Tensor:
            return dequantized(weights, torch.bfloat16)

        def multiply(x: Tensor, weight: Tensor) -> Tensor:
            return torch.mm(x, weight.t())

        prepare: Callable[[Any], Any] = as_bf16
        run: Callable[[Tensor, Any], object] = multiply
        size = 2 * self.outputs * self.inputs
        if peer == "bitsandbytes":
            try:
                bitsandbytes = Bitsandbytes()
            except ImportError:
                return {}
            prepare, run, size = bitsandbytes.prepare, bitsandbytes.launch, self.weight_bytes
        operands = [
            prepare(self.fused.weights(self.base, layer)) for layer in range(self._count(size))
        ]

        times = {}
        for rows in all_rows:
            x = self.kernels.random(rows, self.inputs).bfloat16()
            launches = [partial(run, x, operand) for operand in operands]
            times[rows] = self.watch.each_us(launches, repeats=repeats)
        return times

    def _error(self, rows: int) -> float:
        """Of fresh inputs, relative, over the whole output. Of a sum, against what was added: the
        residual is larger and would hide an error."""
        import torch

        from loriner.bench.kernel_ops import dequantized

        weights = self.fused.weights(self.base, 0)
        x = self.kernels.random(rows, self.inputs)
        residual = self.kernels.residual(self.fused, rows, self.outputs)
        before = 0.0 if residual is None else residual.double()
        operand = self.kernels.prepare(self.fused, weights)
        self.kernels.poison(self.fused, rows, self.outputs)
        out = self.kernels.launch(self.fused, x, operand, residual).double() - before
        product = x.double() @ dequantized(weights, torch.float64).t()
        expected = self.kernels.expected(self.fused, product)
        return float((out - expected).norm() / expected.norm())

    def _num_bytes(self, rows: int) -> int:
        width = self.outputs // 2 if self.fused.gated else self.outputs
        written = 8 if self.fused.adds else 2  # f32 read and written, or bf16 written
        return self.weight_bytes + rows * (2 * self.inputs + written * width)

    def _count(self, operand_bytes: int) -> int:
        return max(2, min(MAX_OPERANDS, math.ceil(COLD_BYTES / operand_bytes)))


def total(parts: Sequence[Measured]) -> Measured:
    """The four linears of a layer; the error is the largest."""
    shared = set.intersection(*(set(part.peers) for part in parts))
    return Measured(
        "all four",
        parts[0].rows,
        sum(part.us for part in parts),
        sum(part.num_bytes for part in parts),
        sum(part.floor_us for part in parts),
        max(part.error for part in parts),
        {peer: sum(part.peers[peer] for part in parts) for peer in sorted(shared)},
    )


def measure_others(
    args: argparse.Namespace,
    base: RandomBase,
    limits: Limits,
    figures: Figures,
) -> None:
    from loriner.bench.step_ops import step_ops

    rows = []
    for op in step_ops(base, args.rows, args.ranks, args.context, args.threads):
        us = figures.watch.each_us(op.launches, repeats=args.repeats)
        floor = 1e3 * limits.floor_ms(op.num_bytes)
        figures.record(
            "op",
            {"op": op.name, "of": op.what, "us": us, "num_bytes": op.num_bytes, "floor_us": floor},
        )
        rows.append((op.name, op.what, f"{us:.1f}", f"{floor:.1f}", f"{floor / us:.0%}"))
    if rows:
        figures.table(OP_HEAD, rows)


def cells(one: Measured) -> tuple[str, ...]:
    return (
        one.linear,
        str(one.rows),
        f"{one.us:.1f}",
        f"{one.floor_us:.1f}",
        f"{one.floor_us / one.us:.0%}",
        f"{one.error:.1e}",
        *(f"{one.peers[peer]:.1f}" if peer in one.peers else "-" for peer in PEERS),
    )
