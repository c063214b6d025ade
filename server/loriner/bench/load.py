"""`loriner bench load`: what a cold adapter costs its own request, and what loads cost the others.

An engine in this process, and a real store of adapters on disk; the files are in the page cache.
Invariant: quiet and loading steps alternate, so that growing contexts weigh on both alike.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from loriner.bench import options
from loriner.errors import ConfigError

if TYPE_CHECKING:
    from loriner.adapters.store import Store
    from loriner.bench.figures import Figures
    from loriner.bench.random_adapters import RandomAdapters
    from loriner.bench.random_base import RandomBase
    from loriner.bench.streams import Streams
    from loriner.bench.target import Need, Target

TIER_HEAD = ("adapter is", "first token ms", "slowest", "more than warm ms")
GAP_HEAD = ("while", "steps", "median ms", "p99 ms", "longest ms", "p99 / quiet")
TIERS = ("seated", "host", "disk", "disk, first time")
GROUP = 10  # loads between two quiet stretches
SPARE_SEATS = 2
HEADROOM = 4  # adapters on the host beyond those that are asked for


def add_command(subparsers: options.Parsers) -> None:
    parser = options.add_parser(
        subparsers,
        "load",
        run,
        "a cold adapter's time to first token, and what running streams feel of loads",
        "Publishes random adapters in a store, then measures the first token of a prompt whose"
        " adapter is seated, on the host, or on disk (in the page cache; the first time after its"
        " publication apart), in an idle engine. Then streams decode while adapters are loaded one"
        " after another: by themselves, and each for a request of one token.",
    )
    options.add_ranks(parser)
    parser.add_argument("--streams", type=int, default=32, help="running streams (default: 32)")
    parser.add_argument("--loads", type=int, default=100, help="adapters loaded (default: 100)")
    parser.add_argument("--trials", type=int, default=8, help="first tokens of each (default: 8)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument(
        "--longest", type=int, default=4096, help="tokens of a stream (default: 4096)"
    )
    parser.add_argument(
        "--folder", type=Path, help="for the store, some GB (default: a temporary one)"
    )


def run(args: argparse.Namespace) -> int:
    options.require_device(args)
    from loriner.bench.figures import Figures
    from loriner.bench.publishing import publish
    from loriner.bench.random_adapters import draw
    from loriner.bench.target import Target

    base, adapters = draw(args)
    check_flags(args, base.config.max_context)
    figures = Figures(args)
    seats = args.streams + SPARE_SEATS
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store = open_store(Path(folder) / "store", base)
        names = publish(store.root, base, adapters, seats + args.trials)
        need = need_of(args, base, adapters, seats)
        target = Target(base, adapters, need, args.threads, store)
        try:
            cold = names[seats:]
            measure_tiers(target, names[:seats], cold, args.prompt, figures)
            measure_gaps(target, names[: args.streams], cold, args, figures)
        finally:
            target.close()
            store.close()
    return 0


def check_flags(args: argparse.Namespace, max_context: int) -> None:
    """Raises ConfigError."""
    from loriner.bench.streams import ROOM

    for flag in ("streams", "loads", "trials", "prompt"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"{flag}: at least 1.")
    tokens = min(args.longest, max_context)
    if tokens - args.prompt <= ROOM:
        raise ConfigError(
            f"longest: a stream of {tokens} tokens with a prompt of {args.prompt} has no room for"
            f" a load, which takes {ROOM}."
        )


def open_store(root: Path, base: RandomBase) -> Store:
    from loriner.adapters.store import Store

    return Store(root, base.config.modules(), base.base_digest, base_tensor=base.dense)


def need_of(
    args: argparse.Namespace, base: RandomBase, adapters: RandomAdapters, seats: int
) -> Need:
    from loriner.bench.target import Need

    largest = max(map(adapters.num_bytes, range(len(args.ranks))))
    return Need(
        rows=args.streams + 1,
        tokens=min(args.longest, base.config.max_context),
        seat_sizes=[largest] * seats,
        step_tokens=2048,
        num_hosted=seats + args.trials + HEADROOM,
    )


def measure_tiers(
    target: Target, fillers: Sequence[str], cold: Sequence[str], prompt_len: int, figures: Figures
) -> None:
    """First-token times of each of `cold` in every tier; `fillers` take all seats away from it."""
    from loriner.bench import drive

    engine, registry = target.engine, target.engine.registry
    prompts = drive.Prompts(target.vocab_size)
    times: dict[str, list[float]] = {tier: [] for tier in TIERS}

    def ask(tier: str, generation: str) -> None:
        expected = {"seated": "gpu", "host": "host"}.get(tier, "disk")
        assert registry.tier(generation) == expected, (tier, registry.tier(generation))
        asked = [drive.request("load", prompts.one(prompt_len), generation, 1)]
        trace = drive.run(engine, asked)
        times[tier].append(1e3 * (trace.first["load"] - trace.begun))

    drive.warm(engine, prompts, fillers)
    for generation in cold:
        ask("disk, first time", generation)
        ask("seated", generation)
        drive.warm(engine, prompts, fillers)
        ask("host", generation)
        drop(target, generation)
        ask("disk", generation)
        drop(target, generation)
    warm_ms = statistics.median(times["seated"])
    rows = []
    for tier, found in times.items():
        middle = statistics.median(found)
        figures.record("load", {"tier": tier, "ms": middle, "more_ms": middle - warm_ms})
        more = "" if tier == "seated" else f"{middle - warm_ms:+.1f}"
        rows.append((tier, f"{middle:.1f}", f"{max(found):.1f}", more))
    figures.table(TIER_HEAD, rows)


def drop(target: Target, generation: str, step: Callable[[], object] | None = None) -> None:
    """Take it from seat and host; its files stay. A copy under way is waited for."""
    from loriner.bench import drive

    while not target.engine.registry.evict(generation):
        step() if step else drive.step(target.engine)


def measure_gaps(
    target: Target,
    running: Sequence[str],
    cold: Sequence[str],
    args: argparse.Namespace,
    figures: Figures,
) -> None:
    """Gaps between the tokens of `running` streams: quiet, and while `cold` ones are loaded."""
    from loriner.bench.streams import Streams

    gaps: dict[str, list[float]] = {"quiet": [], "loading": [], "loading and asking": []}
    num_loads = 0
    for label, load in (("loading", load_alone), ("loading and asking", load_and_ask)):
        streams = Streams(target, running, args.prompt)  # anew: each way has whole contexts
        names = islice(cycle(cold), args.loads)
        loads = [partial(load, target, streams, name, args.prompt) for name in names]
        num_loads += alternate(streams, loads, gaps[label], gaps["quiet"])
        streams.close()
    told = f"{args.streams} streams; {num_loads} adapters loaded of {2 * args.loads}"
    if num_loads < 2 * args.loads:
        told += f": contexts of {target.runner.max_len} tokens had room for no more"
    figures.note(told)
    tell_gaps(gaps, figures)


def alternate(
    streams: Streams,
    loads: Sequence[Callable[[], None]],
    loading: list[float],
    quiet: list[float],
) -> int:
    """Groups of `loads`, and as many quiet steps after each, while there is room for both; how many
    were loaded."""
    num_loads = 0
    for first in range(0, len(loads), GROUP):
        before = len(loading)
        with streams.gaps_into(loading):
            for load in loads[first : first + GROUP]:
                if streams.has_room(len(loading) - before):
                    load()
                    num_loads += 1
        with streams.gaps_into(quiet):
            streams.run(len(loading) - before)
    return num_loads


def tell_gaps(gaps: Mapping[str, Sequence[float]], figures: Figures) -> None:
    """Beside those of the quiet; where no gap was seen there are no figures."""
    found = {label: summary(seen) for label, seen in gaps.items()}
    quiet_ms = found["quiet"].get("p99_ms")
    rows = []
    for label, of in found.items():
        if quiet_ms and "p99_ms" in of:
            of["p99_of_quiet"] = of["p99_ms"] / quiet_ms
        figures.record("gaps", {"while": label, **of})
        keys = ("median_ms", "p99_ms", "longest_ms", "p99_of_quiet")
        cells = (f"{of[key]:.2f}" if key in of else "none" for key in keys)
        rows.append((label, str(of["steps"]), *cells))
    figures.table(GAP_HEAD, rows)


def load_alone(target: Target, streams: Streams, generation: str, prompt_len: int) -> None:
    """From disk to a seat and away again, with no request for it."""
    from loriner.adapters.registry import Readiness

    target.engine.keep([generation])
    while target.engine.registry.want(generation) is not Readiness.SEATED:
        streams.step()
    target.engine.keep([])
    drop(target, generation, streams.step)


def load_and_ask(target: Target, streams: Streams, generation: str, prompt_len: int) -> None:
    """For a request of one token, which is answered before the next load."""
    streams.ask(generation, prompt_len)
    drop(target, generation, streams.step)


def summary(gaps: Sequence[float]) -> dict[str, float]:
    """Milliseconds; `gaps` are seconds. Of no gaps, only that there are none."""
    if not gaps:
        return {"steps": 0}
    ordered = sorted(1e3 * gap for gap in gaps)
    return {
        "steps": len(ordered),
        "median_ms": statistics.median(ordered),
        "p99_ms": ordered[len(ordered) * 99 // 100],
        "longest_ms": ordered[-1],
    }
