"""`loriner bench serve`: the whole server over HTTP, beside the engine alone.

Starts `loriner serve` on a random base, publishes random adapters through its door, and lets some
client processes stream. Invariant: both rates are of the time in which every stream decodes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from loriner.bench import options
from loriner.bench.clients import Answer, stream
from loriner.bench.served import serving
from loriner.errors import ConfigError

if TYPE_CHECKING:
    from loriner.bench.random_adapters import RandomAdapters
    from loriner.bench.random_base import RandomBase

HEAD = ("", "tokens/s", "of engine", "gap p50 ms", "gap p99 ms", "p99 / p50", "longest ms")
FIRST_HEAD = ("first token ms", "p50", "p99")
WRITERS = 4  # threads; a server takes so many uploads at a time


def add_command(subparsers: options.Parsers) -> None:
    parser = options.add_parser(
        subparsers,
        "serve",
        run,
        "tokens/s of the whole server over HTTP, beside the engine alone",
        "Writes a random base and adapters, starts `loriner serve` on them, and streams"
        " completions from client processes: tokens/s while all streams decode, gaps between the"
        " tokens of a stream, time to first token of a burst. Then the same rows in an engine in"
        " this process. Further flags for the server stand after `--`.",
    )
    options.add_ranks(parser)
    parser.add_argument("--streams", type=int, default=64, help="at once (default: 64)")
    parser.add_argument("--adapters", type=int, default=0, help="(default: one for each stream)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer (default: 256)")
    parser.add_argument("--turns", type=int, default=1, help="requests of a stream (default: 1)")
    parser.add_argument("--clients", type=int, default=4, help="client processes (default: 4)")
    parser.add_argument("--base", type=Path, help="folder of `loriner bench base` (default: made)")
    parser.add_argument("--folder", type=Path, help="for base and adapters (default: temporary)")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="further flags of `serve`")


@dataclass(frozen=True, slots=True)
class Measured:
    """One side: over HTTP, or the engine alone. Gaps are of one stream's tokens."""

    what: str
    tokens_per_s: float
    gap_p50_ms: float
    gap_p99_ms: float
    gap_longest_ms: float


def run(args: argparse.Namespace) -> int:
    options.require_device(args)
    from loriner.bench.figures import Figures
    from loriner.bench.random_adapters import draw

    base, adapters = draw(args)
    figures = Figures(args)
    answers = measure_http(args, base, adapters)
    over_http = of_answers(answers)
    alone = measure_engine(args, base, adapters)
    first = sorted(1e3 * answer.first for answer in answers)
    firsts = {"p50_ms": percentile(first, 50), "p99_ms": percentile(first, 99)}
    ratio = over_http.tokens_per_s / alone.tokens_per_s
    common = {"shape": args.shape, "streams": args.streams, "adapters": num_adapters(args)}
    figures.record("serve", {**common, **asdict(over_http), "of_engine": ratio})
    figures.record("serve", {**common, **asdict(alone), "of_engine": 1.0})
    figures.record("first_token", {**common, **firsts})
    figures.table(HEAD, [cells(over_http, alone), cells(alone, alone)])
    values = [f"{value:.1f}" for value in firsts.values()]
    figures.table(FIRST_HEAD, [(f"burst of {args.streams}", *values)])
    return 0


def num_adapters(args: argparse.Namespace) -> int:
    return int(args.adapters or args.streams)


def measure_http(
    args: argparse.Namespace, base: RandomBase, adapters: RandomAdapters
) -> list[Answer]:
    """Every stream's answers from a server of its own."""
    from loriner.bench.base_folder import write_base

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        model = args.base or folder / "base"
        if args.base is None:
            write_base(base, model)
        with serving(serve_flags(args, model), folder) as port:
            names = [f"random-{i}" for i in range(num_adapters(args))]
            publish(port, adapters, names, folder / "uploads")
            warm = [[body(args, base, stream_id, 0, 2)] for stream_id in range(args.streams)]
            stream(port, warm, args.clients)
            asked = [
                [body(args, base, stream_id, turn, args.new) for turn in range(args.turns)]
                for stream_id in range(args.streams)
            ]
            return stream(port, asked, args.clients)


def serve_flags(args: argparse.Namespace, model: Path) -> list[str]:
    flags = ["--model", str(model), "--device", args.device, "--no-prefix-cache"]
    flags += ["--max-sequences", str(args.streams), "--max-seats", str(args.streams)]
    flags += ["--max-step-tokens", str(max(2048, args.streams))]
    return [*flags, "--num-threads", str(args.threads), *args.flags]


def publish(
    port: int,
    adapters: RandomAdapters,
    names: Sequence[str],
    folder: Path,
    *,
    key: str = "",
    num_writers: int = WRITERS,
) -> None:
    """Adapter number i by the i-th name, through the admin door, from a path; each folder goes
    when it is published."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=300) as http:

        def one(index: int) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as own:
                written = adapters.write(index, Path(own) / "adapter")
                asked = {"name": names[index], "path": str(written)}
                http.post("/admin/adapters", json=asked).raise_for_status()

        with ThreadPoolExecutor(num_writers) as threads:
            list(threads.map(one, range(len(names))))


def body(
    args: argparse.Namespace, base: RandomBase, stream_id: int, turn: int, new: int
) -> dict[str, object]:
    """What one stream asks in one turn: adapters go round."""
    from loriner.bench.drive import Prompts

    index = (turn * args.streams + stream_id) % num_adapters(args)
    prompt = Prompts(base.config.vocab_size, seed=turn << 16 | stream_id).one(args.prompt)
    asked = {"adapter": f"random-{index}", "prompt": list(prompt), "max_tokens": new}
    return {**asked, "temperature": 0, "ignore_eos": True}


def measure_engine(
    args: argparse.Namespace, base: RandomBase, adapters: RandomAdapters
) -> Measured:
    """The same rows, prompts and answers in the engine's own loop."""
    from loriner.bench import drive
    from loriner.bench.target import Need, Target

    picks = [row % num_adapters(args) for row in range(args.streams)]
    sizes = [adapters.num_bytes(pick) for pick in set(picks)]
    need = Need(args.streams, args.prompt + args.new + 16, sizes, step_tokens=2048)
    target = Target(base, adapters, need, args.threads)
    try:
        prompts = drive.Prompts(base.config.vocab_size)
        drive.warm(target.engine, prompts, map(adapters.generation, picks))
        asked = drive.requests(prompts, picks, adapters.generation, args.prompt, args.new)
        trace = drive.run(target.engine, asked)
    finally:
        target.close()
    rate = args.streams * len(trace.gaps) / sum(trace.gaps)
    return of_gaps("engine alone", rate, trace.gaps)


def of_answers(answers: Sequence[Answer]) -> Measured:
    """Counted from when the last stream had its first token until the first one ended."""
    begin = max(answer.tokens[0] for answer in answers if answer.turn == 0)
    last = max(answer.turn for answer in answers)
    end = min(answer.tokens[-1] for answer in answers if answer.turn == last)
    if end <= begin:
        raise ConfigError("new: the streams never decoded all at once; ask for longer answers.")
    return of_window("over HTTP", answers, begin, end)


def of_window(what: str, answers: Sequence[Answer], begin: float, end: float) -> Measured:
    """The tokens and gaps between these times, monotonic seconds; there are some of both."""
    count = sum(begin < token <= end for answer in answers for token in answer.tokens)
    gaps = [
        b - a
        for answer in answers
        for a, b in zip(answer.tokens, answer.tokens[1:], strict=False)
        if begin <= a and b <= end
    ]
    return of_gaps(what, count / (end - begin), gaps)


def of_gaps(what: str, tokens_per_s: float, gaps: Sequence[float]) -> Measured:
    ordered = sorted(1e3 * gap for gap in gaps)
    return Measured(
        what, tokens_per_s, statistics.median(ordered), percentile(ordered, 99), ordered[-1]
    )


def percentile(ordered: Sequence[float], percent: int) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def cells(one: Measured, alone: Measured) -> tuple[str, ...]:
    return (
        one.what,
        f"{one.tokens_per_s:,.0f}",
        f"{one.tokens_per_s / alone.tokens_per_s:.0%}",
        f"{one.gap_p50_ms:.2f}",
        f"{one.gap_p99_ms:.2f}",
        f"{one.gap_p99_ms / one.gap_p50_ms:.2f}" if one.gap_p50_ms else "-",
        f"{one.gap_longest_ms:.2f}",
    )
