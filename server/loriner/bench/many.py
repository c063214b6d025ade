"""`loriner bench many`: far more adapters than seats, served in turn, and every answer checked.

An engine in this process on a real store: adapters come from the GPU, the host and the disk.
Invariant: an answer is right when tokens and their log-probabilities are those of the same adapter
alone in the engine, its weights straight from where they were drawn.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loriner.bench import options
from loriner.errors import ConfigError

if TYPE_CHECKING:
    from loriner.bench.figures import Figures
    from loriner.bench.random_adapters import RandomAdapters
    from loriner.bench.random_base import RandomBase
    from loriner.bench.target import Need, Target
    from loriner.core import Event, Request

HEAD = ("adapter was on", "requests", "first token p50 ms", "p99 ms", "longest ms")
TIERS = ("gpu", "host", "disk")
ROWS_A_STEP = 256  # up to here a row does not depend on its neighbours, bit for bit
SAME = 1e-5  # nats: a random adapter is further than this from another, and from none
SPARE_BYTES = 2 << 30  # of disk, beside the adapters


def add_command(subparsers: options.Parsers) -> None:
    parser = options.add_parser(
        subparsers,
        "many",
        run,
        "far more adapters than seats, served in turn, and whether every answer is right",
        "Publishes random adapters in a store, then asks each of them one prompt, first to last and"
        " back to the first, so many at once. Prints where the adapters were, the times to the"
        " first token, and how many answers were wrong: those that differ between the two ways,"
        " and, of some adapters, from what they say alone with weights that went through no store."
        " Exits with 1 when one is wrong.",
    )
    options.add_ranks(parser)
    parser.add_argument("--adapters", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--streams", type=int, default=32, help="requests at once (default: 32)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer (default: 16)")
    parser.add_argument("--seats", type=int, default=64, help="adapters on the GPU (default: 64)")
    parser.add_argument("--hosted", type=int, default=192, help="and on the host (default: 192)")
    parser.add_argument(
        "--checked", type=int, default=64, help="adapters that are also asked alone (default: 64)"
    )
    parser.add_argument("--folder", type=Path, help="for the store (default: a temporary one)")


Answer = list[tuple[int, float]]  # tokens and their log-probabilities


@dataclass(slots=True)
class Asked:
    """One request. Times are perf_counter seconds."""

    index: int  # of its adapter
    tier: str  # where that was
    begun: float
    first: float = 0.0
    answer: Answer = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Checked:
    """Adapters by number."""

    num_requests: int
    changed: list[int]  # which answered otherwise on the way back
    wrong: list[int]  # which answered otherwise alone
    num_checked: int
    num_like_base: int  # of the checked ones, how many answer as the base does
    largest: float  # distance of two answers that count as the same


def run(args: argparse.Namespace) -> int:
    options.require_device(args)
    from loriner.bench.figures import Figures
    from loriner.bench.load import open_store
    from loriner.bench.publishing import publish
    from loriner.bench.random_adapters import draw
    from loriner.bench.target import Target

    base, adapters = draw(args)
    figures = Figures(args)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        num_bytes = check_free(folder, adapters, args.adapters)
        store = open_store(folder / "store", base)
        begun = time.perf_counter()
        generations = publish(store.root, base, adapters, args.adapters)
        seconds = time.perf_counter() - begun
        figures.note(f"{args.adapters} adapters, {num_bytes / 1e9:.1f} GB, in {seconds:.0f} s")
        target = Target(base, adapters, need_of(args, base, adapters), args.threads, store)
        try:
            found = measure(target, generations, args, figures)
        finally:
            target.close()
            store.close()
    figures.record("checked", {"shape": args.shape, "adapters": args.adapters, **asdict(found)})
    return report(found, figures)


def report(found: Checked, figures: Figures) -> int:
    """The exit status."""
    figures.note(
        f"{found.num_requests} requests; {len(found.changed)} answers changed on the way back;"
        f" {len(found.wrong)} of {found.num_checked} differ from the adapter alone;"
        f" {found.num_like_base} of those answer as the base does; answers that agree are"
        f" {found.largest:.2g} nats apart at most"
    )
    return 1 if found.changed or found.wrong else 0


def check_free(folder: Path, adapters: RandomAdapters, count: int) -> int:
    """Bytes of all adapters. Raises ConfigError when the disk does not hold them."""
    num_bytes = sum(map(adapters.num_bytes, range(count)))
    free = shutil.disk_usage(folder).free
    if num_bytes + SPARE_BYTES > free:
        raise ConfigError(
            f"folder: {count} adapters take {num_bytes / 1e9:.1f} GB; {free / 1e9:.1f} are free."
        )
    return num_bytes


def need_of(args: argparse.Namespace, base: RandomBase, adapters: RandomAdapters) -> Need:
    from loriner.bench.target import Need

    largest = max(map(adapters.num_bytes, range(len(args.ranks))))
    tokens = args.prompt + args.new + 16
    if tokens > base.config.max_context:
        raise ConfigError(f"prompt: the shape's context is {base.config.max_context} tokens.")
    return Need(args.streams, tokens, [largest] * args.seats, ROWS_A_STEP, args.hosted)


def measure(
    target: Target, generations: Sequence[str], args: argparse.Namespace, figures: Figures
) -> Checked:
    count = len(generations)
    begun = time.perf_counter()
    there = serve(target, generations, range(count), args)
    back = serve(target, generations, reversed(range(count)), args)
    seconds = time.perf_counter() - begun
    target.engine.registry.check_integrity()
    figures.note(
        f"{2 * count / seconds:.1f} requests/s, {2 * count * args.new / seconds:,.0f} tokens/s;"
        f" {target.engine.registry.num_loads} loads, {target.engine.pool.num_evictions} evictions"
    )
    figures.table(HEAD, [row for tier in TIERS for row in cells(tier, [*there, *back], figures)])
    answers = {one.index: one.answer for one in there}
    apart = {one.index: distance(one.answer, answers[one.index]) for one in back}
    picked = range(0, count, max(1, count // max(1, args.checked)))[: args.checked]
    alone, num_like_base = check_alone(target, picked, answers, args)
    agreeing = [value for value in (*apart.values(), *alone.values()) if value <= SAME]
    largest = max(agreeing, default=0.0)
    return Checked(2 * count, far(apart), far(alone), len(picked), num_like_base, largest)


def serve(
    target: Target, generations: Sequence[str], order: Iterable[int], args: argparse.Namespace
) -> list[Asked]:
    """Ask the adapters in this order, `args.streams` requests under way. Raises EngineFailedError
    when one fails."""
    from loriner.bench import drive

    left, running, ended = iter(order), dict[str, Asked](), list[Asked]()
    while True:
        while len(running) < args.streams and (index := next(left, None)) is not None:
            tier = target.engine.registry.tier(generations[index])
            running[str(index)] = Asked(index, tier, time.perf_counter())
            target.engine.submit(ask(target, index, generations[index], args))
        if not running:
            return ended
        for event in drive.checked(drive.step(target.engine)):
            asked = running[event.request_id]
            asked.first = asked.first or time.perf_counter()
            asked.answer += answer_of(event)
            if event.finish_reason is not None:
                ended.append(running.pop(event.request_id))


def check_alone(
    target: Target, picked: Sequence[int], answers: dict[int, Answer], args: argparse.Namespace
) -> tuple[dict[int, float], int]:
    """How far each is from what it says alone, its weights not from the store; and how many say
    what the base says."""
    names = [target.adapters.generation(index) for index in picked]
    target.bypass_store()
    apart, num_like_base = {}, 0
    for index, generation in zip(picked, names, strict=True):
        alone = ask_alone(target, index, generation, args)
        apart[index] = distance(alone, answers[index])
        num_like_base += distance(alone, ask_alone(target, index, None, args)) <= SAME
    return apart, num_like_base


def ask_alone(
    target: Target, index: int, generation: str | None, args: argparse.Namespace
) -> Answer:
    from loriner.bench import drive

    target.engine.submit(ask(target, index, generation, args))
    answer: Answer = []
    while target.engine.has_work:
        for event in drive.checked(drive.step(target.engine)):
            answer += answer_of(event)
    return answer


def answer_of(event: Event) -> Answer:
    return [(one.token_id, one.logprob) for one in event.logprobs]


def distance(one: Answer, other: Answer) -> float:
    """The largest between their log-probabilities; infinite when tokens differ."""
    if [token for token, _ in one] != [token for token, _ in other]:
        return math.inf
    return max(abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True))


def far(apart: Mapping[int, float]) -> list[int]:
    """Those that answered something else."""
    return sorted(index for index, value in apart.items() if value > SAME)


def ask(target: Target, index: int, generation: str | None, args: argparse.Namespace) -> Request:
    """The same prompt each time for adapter number `index`."""
    from loriner.bench import drive

    prompt = drive.Prompts(target.vocab_size, seed=index).one(args.prompt)
    return drive.request(str(index), prompt, generation, args.new, logprobs=0)


def cells(tier: str, asked: Sequence[Asked], figures: Figures) -> list[tuple[str, ...]]:
    """A row of the table, where there were any."""
    from loriner.bench.serve import percentile

    times = sorted(1e3 * (one.first - one.begun) for one in asked if one.tier == tier)
    if not times:
        return []
    values = {"p50_ms": percentile(times, 50), "p99_ms": percentile(times, 99)}
    values["longest_ms"] = times[-1]
    figures.record("many", {"tier": tier, "requests": len(times), **values})
    return [(tier, str(len(times)), *(f"{value:.1f}" for value in values.values()))]
