"""Benchmarks that measure us beside others, in one run on one machine. Light to import."""

from __future__ import annotations

import argparse
from typing import Any


def add_commands(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add `bench` to the command line; the parsed arguments carry `run(args) -> exit status`."""
    bench = subparsers.add_parser(
        "bench", help="measure Loriner, on a CPU beside other engines, on a GPU beside its limits"
    )
    kinds = bench.add_subparsers(dest="bench", required=True, metavar="KIND")
    from loriner.bench import (
        base_folder,
        beside,
        cost,
        cpu,
        decode,
        fairness,
        kernels,
        load,
        many,
        prefill,
        serve,
        train,
    )

    serving = (decode, kernels, prefill, load, serve, fairness, many, beside)
    for kind in (cpu, base_folder, *serving, train, cost):
        kind.add_command(kinds)
