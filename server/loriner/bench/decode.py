"""`loriner bench decode`: milliseconds of a decode step over rows, popularity, ranks and context.

Rows are prefilled and decoded by the engine's own loop; a step from the middle of the answers is
then launched again and again. Invariant: bytes, floor and time are of the same context.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loriner.bench import options
from loriner.bench.popularity import BASE, picks
from loriner.errors import ConfigError

if TYPE_CHECKING:
    from loriner.bench.figures import Figures, Limits
    from loriner.bench.target import Need, Target
    from loriner.engine.step_input import StepInput

HEAD = (
    "rows",
    "adapters",
    "ranks",
    "context",
    "ms/step",
    "loop ms",
    "tokens/s",
    "GB to move",
    "floor ms",
    "of floor",
    "base ms",
    "x base",
)

PROFILED = 5  # launches


def add_command(subparsers: options.Parsers) -> None:
    parser = options.add_parser(
        subparsers,
        "decode",
        run,
        "milliseconds of a decode step, beside what its bytes take",
        "Decodes on a random NF4 base with random adapters on all seven linears, through the"
        " engine that `serve` runs. The context is the mean over the answers: a prompt of"
        " context - new/2 tokens, then `new` tokens, so 128 + 128 tokens are a context of 192."
        " ms/step: a step of that context launched again, median. loop ms: the engine's loop,"
        " median over the answers, host included. Bytes: NF4 codes and scales as stored, bf16"
        " lm_head, each distinct adapter once, keys and values. Floor: those bytes at the read"
        " bandwidth measured now. Base: the same rows and context without adapters.",
    )
    options.add_rows(parser, "1,8,32,64,128")
    parser.add_argument(
        "--popularity",
        type=options.popularities,
        default=("none", "identical", "distinct"),
        help="of none, identical, distinct, uniform, zipf:A, skewed, separated by commas"
        " (default: none,identical,distinct)",
    )
    options.add_ranks(parser)
    parser.add_argument(
        "--adapters",
        type=int,
        default=1000,
        help="how many there are for uniform and zipf to draw from (default: 1000)",
    )
    parser.add_argument(
        "--context",
        type=options.counts,
        default=(192,),
        help="mean tokens a row sees, one or several (default: 192: 128 prompt and 128 new)",
    )
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer (default: 128)")
    parser.add_argument("--repeats", type=int, default=50, help="launches timed (default: 50)")
    parser.add_argument(
        "--profile", action="store_true", help="also each kernel's time in each case"
    )


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: one row of the table."""

    rows: int
    popularity: str
    context: int
    new: int
    picks: tuple[int, ...]

    @property
    def used(self) -> tuple[int, ...]:
        """The distinct adapters."""
        return tuple(sorted(set(self.picks) - {BASE}))


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of figures."""

    rows: int
    popularity: str
    num_adapters: int
    ranks: tuple[int, ...]
    context: float  # of the step that was launched again
    step_ms: float
    loop_ms: float
    loop_p99_ms: float
    linears_bytes: int
    head_bytes: int
    adapters_bytes: int
    kv_bytes: int
    floor_ms: float
    base_ms: float | None = None

    @property
    def tokens_per_s(self) -> float:
        return 1e3 * self.rows / self.step_ms

    @property
    def num_bytes(self) -> int:
        return self.linears_bytes + self.head_bytes + self.adapters_bytes + self.kv_bytes


def run(args: argparse.Namespace) -> int:
    options.require_device(args)
    from loriner.bench.figures import Figures
    from loriner.bench.random_adapters import draw
    from loriner.bench.target import Target

    base, adapters = draw(args)
    cases = list_cases(args, base.config.max_context)
    figures = Figures(args)
    limits = figures.measure_limits()
    need = need_of(cases, adapters.num_bytes)
    target = Target(base, adapters, need, args.threads)
    try:
        measured = measure_all(target, cases, limits, args, figures)
    finally:
        target.close()
    figures.note(f"{args.shape}, {base.num_bytes / 1e9:.2f} GB stored")
    figures.table(HEAD, [cells(one) for one in measured])
    return 0


def list_cases(args: argparse.Namespace, longest: int) -> list[Case]:
    """Base-only first for each number of rows and each context, as all others stand beside it."""
    kinds = ["none", *(kind for kind in args.popularity if kind != "none")]
    found = []
    for context in args.context:
        new = min(args.new, 2 * (context - 1))
        if context + new // 2 + 2 > longest:
            continue
        for rows in args.rows:
            for kind in kinds:
                chosen = picks(kind, rows, args.adapters, seed=args.seed)
                found.append(Case(rows, kind, context, new, tuple(chosen)))
    if not found:
        raise ConfigError(f"context: the shape's is {longest} tokens, the answer's half included.")
    return found


def need_of(cases: list[Case], num_bytes: Callable[[int], int]) -> Need:
    from loriner.bench.target import Need

    most = max((case.used for case in cases), key=lambda used: sum(map(num_bytes, used)))
    seats = max(len(case.used) for case in cases)
    return Need(
        rows=max(case.rows for case in cases),
        tokens=max(case.context + case.new // 2 for case in cases) + 64,
        seat_sizes=[*map(num_bytes, most), *[0] * (seats - len(most))],
    )


def measure_all(
    target: Target, cases: list[Case], limits: Limits, args: argparse.Namespace, figures: Figures
) -> list[Measured]:
    base_ms: dict[tuple[int, int], float] = {}
    measured = []
    for case in cases:
        found, again = measure(target, case, limits, args.repeats)
        key = (case.rows, case.context)
        if case.popularity == "none":
            base_ms[key] = found.step_ms
        found = dataclasses.replace(found, base_ms=base_ms[key])
        measured.append(found)
        derived = {"tokens_per_s": found.tokens_per_s, "num_bytes": found.num_bytes}
        values = {"shape": target.base.shape, **dataclasses.asdict(found), **derived}
        figures.record("decode", values)
        if args.profile:
            profile(target, case, again, figures)
    return measured


def profile(target: Target, case: Case, again: Callable[[], object], figures: Figures) -> None:
    """Print what the kernels of the step took."""
    from loriner.bench.profiled import HEAD as KERNEL_HEAD
    from loriner.bench.profiled import kernel_times, rows_of

    times = kernel_times(target.watch, again, PROFILED)
    figures.note(f"{case.rows} rows, {case.popularity}, context {case.context}:")
    figures.table(KERNEL_HEAD, rows_of(times))
    common = {"rows": case.rows, "popularity": case.popularity, "context": case.context}
    for one in times:
        figures.record("kernel", {**common, **dataclasses.asdict(one)}, echo=False)


def measure(
    target: Target, case: Case, limits: Limits, repeats: int
) -> tuple[Measured, Callable[[], object]]:
    """Decode `case` in the engine, then time the step from the middle of its answers; the step."""
    from loriner.bench import drive
    from loriner.bench.traffic import step_traffic

    adapters, prompts = target.adapters, drive.Prompts(target.vocab_size, seed=case.rows)
    drive.warm(target.engine, prompts, map(adapters.generation, case.used))
    middle: list[StepInput] = []

    def keep(trace: drive.Trace) -> None:
        step = target.last_step
        if len(trace.full) > case.new // 2 and not middle and step and step.num_rows == case.rows:
            middle.append(step)

    # The first rows decode while the last are prefilled: they are ahead by so many tokens.
    ahead = case.rows * case.context // target.step_tokens
    prompt_len = max(1, case.context - (case.new + ahead) // 2)
    asked = drive.requests(
        prompts, case.picks, adapters.generation, prompt_len, case.new + ahead + 1
    )
    trace = drive.run(target.engine, asked, keep)
    (step,) = middle
    context = float(step.context.mean())
    sizes = [adapters.num_bytes(pick) for pick in case.used]
    traffic = step_traffic(target.base.config, sizes, case.rows, context, target.kv_itemsize)
    gaps = sorted(trace.gaps)
    again = target.again(step)
    found = Measured(
        rows=case.rows,
        popularity=case.popularity,
        num_adapters=len(case.used),
        ranks=tuple(sorted({adapters.rank(pick) for pick in case.used})),
        context=context,
        step_ms=target.watch.median_ms(again, repeats=repeats),
        loop_ms=1e3 * statistics.median(gaps),
        loop_p99_ms=1e3 * gaps[len(gaps) * 99 // 100],
        linears_bytes=traffic.linears,
        head_bytes=traffic.head,
        adapters_bytes=traffic.adapters,
        kv_bytes=traffic.kv,
        floor_ms=limits.floor_ms(traffic.total),
    )
    return found, again


def cells(one: Measured) -> tuple[str, ...]:
    base_ms = one.base_ms or one.step_ms
    kind = one.popularity if one.popularity in ("none", "identical") else ""
    return (
        str(one.rows),
        kind or f"{one.popularity} ({one.num_adapters})",
        ",".join(map(str, one.ranks)) or "-",
        f"{one.context:.0f}",
        f"{one.step_ms:.3f}",
        f"{one.loop_ms:.3f}",
        f"{one.tokens_per_s:,.0f}",
        f"{one.num_bytes / 1e9:.2f}",
        f"{one.floor_ms:.3f}",
        f"{one.floor_ms / one.step_ms:.0%}",
        f"{base_ms:.3f}",
        f"{one.step_ms / base_ms:.2f}",
    )
