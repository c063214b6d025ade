"""`loriner bench beside`: what a training job on a server costs the streams that it serves.

Starts `loriner serve`, keeps streams full for a window, and again while a fine-tuning job trains.
Invariant: quiet and beside are windows of one length on one server, each of streams that began
anew, so that contexts grow alike in both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loriner.bench import options
from loriner.bench.clients import START_S, stream_until
from loriner.bench.fine_tuning import FineTuning, tokens_per_s, training, write_rows
from loriner.bench.serve import Measured, of_window
from loriner.bench.served import serving
from loriner.config import ServerConfig
from loriner.errors import ConfigError

if TYPE_CHECKING:
    from loriner.bench.figures import Figures

HEAD = ("streams", "", "tokens/s", "gap p50 ms", "gap p99 ms", "longest ms", "training tokens/s")
STREAMING = ("tokens_per_s", "gap_p50_ms", "gap_p99_ms", "gap_longest_ms")
TRAINING = "training_tokens_per_s"
WARM_STEPS = 8  # of the job, before it is measured: the first ones ready libraries and graphs
MANY_STEPS = 1_000_000  # more than it does before it is cancelled
NUM_ROWS = 512  # of the file that is made
DEFAULTS = {field.name: field.default for field in dataclasses.fields(ServerConfig)}
SHARES = ("training_duty", "training_memory_fraction")


def add_command(subparsers: options.Parsers) -> None:
    parser = options.add_parser(
        subparsers,
        "beside",
        run,
        "what a training job beside a server costs its streams, and what the job gets",
        "Starts `loriner serve` on a random base (or --base), keeps streams of completions full for"
        " a window, then creates a fine-tuning job through its door and measures the same window"
        " while it trains: tokens/s, gaps between the tokens of a stream, and the job's tokens/s,"
        " with streams and alone. Further flags for the server stand after `--`.",
    )
    add = parser.add_argument
    add("--streams", type=options.counts, default=(1, 16, 64), help="(default: 1,16,64)")
    add(
        "--window",
        type=float,
        default=20.0,
        help="seconds of each measurement, several steps of the job (20)",
    )
    add("--settle", type=float, default=3.0, help="seconds of streaming before it (default: 3)")
    add("--prompt", type=int, default=128, help="tokens (default: 128)")
    add("--new", type=int, default=512, help="tokens of an answer (default: 512)")
    add("--clients", type=int, default=4, help="client processes (default: 4)")
    add("--base", type=Path, help="folder of an NF4 base (default: a random one is made)")
    add("--train", type=Path, help="rows, as `loriner train` takes (default: made)")
    add("--length", type=int, default=512, help="longest row, tokens (default: 512)")
    add("--batch", type=int, default=1, help="rows of a step (default: 1)")
    add("--rank", type=int, default=16, help="of the adapter (default: 16)")
    add(
        "--job",
        type=setting_of,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="further settings of `loriner train`, e.g. eval_split=0.2",
    )
    for name in SHARES:
        what = f"the server's flag, for a job on a GPU (default: {DEFAULTS[name]})"
        add(f"--{name.replace('_', '-')}", type=float, help=what)
    add("--folder", type=Path, help="for base and jobs (default: temporary)")
    add("flags", nargs="*", metavar="-- FLAG", help="further flags of `serve`")


def setting_of(text: str) -> tuple[str, object]:
    """ "eval_every=5" -> ("eval_every", 5)."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def run(args: argparse.Namespace) -> int:
    options.require_device(args)
    check_flags(args)
    from loriner.bench.figures import Figures
    from loriner.model.weights import Checkpoint

    figures = Figures(args)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        model = args.base or make_base(args, folder / "base")
        config = Checkpoint.open(model).config
        if args.prompt + args.new > config.max_context:
            raise ConfigError(f"new: prompt and answer are at most {config.max_context} tokens.")
        if args.train is None:
            write_rows(folder / "rows.jsonl", NUM_ROWS, args.length, args.seed)
        told = Told(args, figures)
        with serving(serve_flags(args, model, folder), folder) as port:
            site = Site(port, args, config.vocab_size)
            for count in args.streams:
                told.quiet(count, site.stream(count))
            with training(port, args.train or folder / "rows.jsonl", job_settings(args)) as job:
                job.wait(WARM_STEPS)
                told.alone(site.train_alone(job))
                for count in args.streams:
                    told.beside(count, *site.stream_beside(count, job))
        told.show()
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """Raises ConfigError."""
    for name in ("prompt", "clients", "length", "batch", "rank"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name}: at least 1.")
    if args.new < 2:
        raise ConfigError("new: at least 2, for a gap.")
    if args.window <= 0 or args.settle < 0:
        raise ConfigError("window: more than 0 seconds; settle: at least 0.")
    if args.train is not None and not args.train.is_file():
        raise ConfigError(f"train: {args.train} is no file.")
    for name in SHARES:
        if args.device == "cpu" and getattr(args, name) is not None:
            raise ConfigError(f"{name}: jobs on a CPU have a low priority instead.")


def make_base(args: argparse.Namespace, folder: Path) -> Path:
    """A random one; nothing of it stays on the device, which server and job share."""
    import torch

    from loriner.bench.base_folder import write_base
    from loriner.bench.random_base import RandomBase

    write_base(RandomBase(args.shape, args.device, seed=args.seed), folder)
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return folder


def serve_flags(args: argparse.Namespace, model: Path, folder: Path) -> list[str]:
    flags = ["--model", str(model), "--device", args.device, "--no-prefix-cache"]
    flags += ["--max-sequences", str(max(args.streams)), "--num-threads", str(args.threads)]
    flags += ["--training", str(folder / "training"), "--training-device", args.device]
    for name in SHARES:
        if getattr(args, name) is not None:
            flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return [*flags, *args.flags]


def job_settings(args: argparse.Namespace) -> dict[str, object]:
    own = {"rank": args.rank, "batch": args.batch, "max_length": args.length, "steps": MANY_STEPS}
    return {**own, **dict(args.job)}


class Site:
    """The server, and the windows in which it is measured."""

    def __init__(self, port: int, args: argparse.Namespace, vocab_size: int) -> None:
        from loriner.bench.drive import Prompts

        self._port, self._args = port, args
        self._prompts = Prompts(vocab_size, seed=args.seed)

    def stream(self, count: int) -> Measured:
        """So many streams by themselves."""
        return self._window(count)[0]

    def stream_beside(self, count: int, job: FineTuning) -> tuple[Measured, float]:
        """So many streams while `job` trains, and its tokens/s. Raises JobEndedError."""
        measured, begin, end = self._window(count)
        return measured, _rate(job, begin, end)

    def train_alone(self, job: FineTuning) -> float:
        """The job's tokens/s on the idle server. Raises JobEndedError."""
        begin = time.monotonic()
        time.sleep(self._args.window)
        return _rate(job, begin, time.monotonic())

    def _window(self, count: int) -> tuple[Measured, float, float]:
        """What was seen, and from when to when; monotonic seconds."""
        args = self._args
        bodies = [[self._body()] for _ in range(count)]
        until = time.monotonic() + START_S + args.settle + args.window
        answers = stream_until(self._port, bodies, args.clients, until)
        firsts = [answer.tokens[0] for answer in answers if answer.turn == 0]
        begin = max([until - args.window, *firsts])
        if len(firsts) < count or begin > until - args.window / 2:
            raise ConfigError(f"settle: it takes {count} streams longer until all have a token.")
        if not any(begin <= a.tokens[i] for a in answers for i in range(len(a.tokens) - 1)):
            raise ConfigError("window: no stream had two tokens in it; ask for a longer one.")
        return of_window("over HTTP", answers, begin, until), begin, until

    def _body(self) -> dict[str, object]:
        args = self._args
        asked = {"prompt": list(self._prompts.one(args.prompt)), "max_tokens": args.new}
        return {**asked, "temperature": 0, "ignore_eos": True}


def _rate(job: FineTuning, begin: float, end: float) -> float:
    """Its tokens/s between these times, monotonic seconds. Raises JobEndedError."""
    job.check()
    offset = time.time() - time.monotonic()
    return tokens_per_s(job.steps(begin + offset), begin + offset, end + offset)


class Told:
    """What was measured: a figure is recorded when it is there, the table is shown at the end."""

    def __init__(self, args: argparse.Namespace, figures: Figures) -> None:
        base = args.base.name if args.base else args.shape
        job = {"length": args.length, "batch": args.batch, "rank": args.rank, "job": dict(args.job)}
        self._common = {"base": base, **shares(args), **job, "window_s": args.window}
        self._figures = figures
        self._quiet: dict[int, dict[str, float]] = {}
        self._alone = 0.0
        self._rows: list[tuple[str, ...]] = []

    def quiet(self, count: int, measured: Measured) -> None:
        self._quiet[count] = _values(measured)
        self._record(count, "quiet", self._quiet[count])

    def alone(self, rate: float) -> None:
        self._alone = rate
        self._add(0, "training alone", {TRAINING: rate})

    def beside(self, count: int, measured: Measured, rate: float) -> None:
        quiet = {**self._quiet[count], TRAINING: self._alone}
        beside = {**_values(measured), TRAINING: rate}
        ratio = {name: beside[name] / value for name, value in quiet.items() if value}
        self._show(count, "quiet", self._quiet[count])
        self._add(count, "beside", beside)
        self._add(count, "ratio", ratio)

    def show(self) -> None:
        self._figures.table(HEAD, self._rows)

    def _add(self, count: int, what: str, values: Mapping[str, float]) -> None:
        self._record(count, what, values)
        self._show(count, what, values)

    def _record(self, count: int, what: str, values: Mapping[str, float]) -> None:
        line = {**self._common, "streams": count, "while": what, **values}
        self._figures.record("beside", line)

    def _show(self, count: int, what: str, values: Mapping[str, float]) -> None:
        cells = (_cell(what, name, values.get(name)) for name in (*STREAMING, TRAINING))
        self._rows.append((str(count), what, *cells))


def shares(args: argparse.Namespace) -> dict[str, object]:
    """What the job may take of a GPU."""
    if args.device == "cpu":
        return {}
    given = {name: getattr(args, name) for name in SHARES}
    return {name: DEFAULTS[name] if value is None else value for name, value in given.items()}


def _values(measured: Measured) -> dict[str, float]:
    return {name: getattr(measured, name) for name in STREAMING}


def _cell(what: str, name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if what == "ratio" or name.endswith("ms") else f"{value:,.0f}"
