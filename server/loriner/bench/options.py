"""Flags that the device benchmarks share, and the check that there is a device. Light to import."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loriner.bench.popularity import KINDS, check
from loriner.bench.shapes import SHAPES
from loriner.errors import ConfigError

Parsers = Any  # argparse's subparsers


def add_parser(
    subparsers: Parsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
) -> argparse.ArgumentParser:
    """A subcommand on a random base, with the flags that all of these have."""
    parser = add_plain_parser(subparsers, name, run, summary, description)
    parser.add_argument(
        "--shape",
        choices=list(SHAPES),
        default="llama-3-8b",
        metavar="SHAPE",
        help=f"of {', '.join(SHAPES)} (default: llama-3-8b)",
    )
    return parser


def add_plain_parser(
    subparsers: Parsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
) -> argparse.ArgumentParser:
    """A subcommand with a device, a seed, threads and a file for figures."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=description
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    parser.add_argument("--json", type=Path, help="also append the figures here, as JSON lines")
    parser.add_argument("--commit", default="", help="to report where the code is no git checkout")
    parser.set_defaults(run=run, name=name)
    return parser


def add_rows(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--rows", type=counts, default=counts(default), help=f"batch sizes (default: {default})"
    )


def add_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks",
        type=ranks,
        default=(16,),
        help="of the adapters, taken in turns, e.g. 8,16,32,64 (default: 16)",
    )


def require_device(args: argparse.Namespace) -> None:
    """Raises ConfigError when the device is not there."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        flags = "--device cpu --shape tiny" if hasattr(args, "shape") else "--device cpu"
        raise ConfigError(
            f"bench {args.name} needs a CUDA device; `{flags}` runs the same code without one."
        )


def counts(text: str) -> tuple[int, ...]:
    """ "1,8" -> (1, 8)."""
    return _numbers(text, 1, 1 << 20)


def ranks(text: str) -> tuple[int, ...]:
    return _numbers(text, 1, 256)


def popularities(text: str) -> tuple[str, ...]:
    """Comma-separated kinds."""
    try:
        return tuple(check(part) for part in text.split(","))
    except ValueError:
        known = ", ".join(KINDS)
        raise argparse.ArgumentTypeError(f"{text!r}: a popularity is one of {known}") from None


def _numbers(text: str, low: int, high: int) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(low <= number <= high for number in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers from {low} to {high}")
    return found
