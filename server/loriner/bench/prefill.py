"""`loriner bench prefill`: one long prompt with an adapter, from its submission to its first token.

Through the engine's own loop, so the read-back of the token and one step's bookkeeping are in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loriner.bench import options

if TYPE_CHECKING:
    from loriner.bench.figures import Limits
    from loriner.bench.target import Target

HEAD = ("tokens", "adapter", "ms", "fastest", "tokens/s", "TFLOP/s", "of matmul")


def add_command(subparsers: options.Parsers) -> None:
    parser = options.add_parser(
        subparsers,
        "prefill",
        run,
        "milliseconds of a long prompt with an adapter, beside the bf16 matmul rate",
        "Time from the submission of a prompt to its first token in an idle engine, in one step."
        " FLOP counted: linears, adapter, causal attention, one row of logits. Beside it: a bf16"
        " matmul of 8192^3, measured now.",
    )
    parser.add_argument(
        "--tokens",
        type=options.counts,
        default=(2048,),
        help="prompt lengths (default: 2048)",
    )
    options.add_ranks(parser)
    parser.add_argument(
        "--bf16-shadow", action="store_true", help="the linears are kept in bf16, too"
    )
    parser.add_argument("--repeats", type=int, default=10, help="prompts timed (default: 10)")


@dataclass(frozen=True, slots=True)
class Measured:
    tokens: int
    rank: int  # 0: no adapter
    ms: float
    fastest_ms: float
    flop: int
    flop_per_s: float
    of_matmul: float


def run(args: argparse.Namespace) -> int:
    options.require_device(args)
    from loriner.bench.figures import Figures
    from loriner.bench.random_adapters import draw
    from loriner.bench.target import Need, Target

    base, adapters = draw(args)
    figures = Figures(args)
    limits = figures.measure_limits()
    longest = max(args.tokens)
    sizes = [adapters.num_bytes(index) for index in range(len(args.ranks))]
    shadow: bool = args.bf16_shadow
    need = Need(1, longest + 16, sizes, step_tokens=longest, bf16_shadow=shadow)
    target = Target(base, adapters, need, args.threads)
    told = {"shape": args.shape, "bf16_shadow": shadow}
    measured = []
    try:
        for tokens in args.tokens:
            for index in (None, *range(len(args.ranks))):
                found = measure(target, tokens, index, limits, args.repeats)
                figures.record("prefill", told | dataclasses.asdict(found))
                measured.append(found)
    finally:
        target.close()
    figures.table(HEAD, [cells(one) for one in measured])
    return 0


def measure(
    target: Target, tokens: int, index: int | None, limits: Limits, repeats: int
) -> Measured:
    """Adapter number `index`, or none; prompts are fresh, and the prefix cache is off."""
    from loriner.bench import drive
    from loriner.bench.traffic import prefill_flop

    prompts = drive.Prompts(target.vocab_size, seed=tokens)
    generation = None if index is None else target.adapters.generation(index)
    rank = 0 if index is None else target.adapters.rank(index)
    times = []
    for _ in range(2 + repeats):
        trace = drive.run(
            target.engine, [drive.request("prefill", prompts.one(tokens), generation, 1)]
        )
        times.append(1e3 * (trace.first["prefill"] - trace.begun))
    times = times[2:]
    milliseconds = statistics.median(times)
    flop = prefill_flop(target.base.config, tokens, rank)
    rate = flop / (milliseconds / 1e3)
    return Measured(tokens, rank, milliseconds, min(times), flop, rate, rate / limits.flop_per_s)


def cells(one: Measured) -> tuple[str, ...]:
    return (
        str(one.tokens),
        f"rank {one.rank}" if one.rank else "none",
        f"{one.ms:.2f}",
        f"{one.fastest_ms:.2f}",
        f"{1e3 * one.tokens / one.ms:,.0f}",
        f"{one.flop_per_s / 1e12:.1f}",
        f"{one.of_matmul:.0%}",
    )
