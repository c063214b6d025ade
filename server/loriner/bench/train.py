"""`loriner bench train`: memory and tokens/s of QLoRA on a random NF4 base, beside PEFT's.

Each case is a process of its own, so its peak is its own. Light to import.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from loriner.bench import options
from loriner.bench.worker import WorkerError, run_script

HEAD = ("trainer", "jobs", "tokens/s", "ms a step", "spread", "peak GiB", "loaded GiB", "loss")
OURS, PEER = "own_trainer.py", "peer_trainer.py"
LABELS = {OURS: "loriner", PEER: "PEFT + transformers Trainer"}
GIB = 1 << 30


def add_command(subparsers: options.Parsers) -> None:
    parser = options.add_parser(
        subparsers,
        "train",
        run,
        "memory and tokens/s of QLoRA training, beside PEFT and transformers' Trainer",
        "Trains rank-RANK adapters on all linears of a random NF4 base with double quantisation, "
        "in bf16 on a GPU and fp32 on a CPU, with paged 8-bit AdamW: one job, JOBS together, and "
        "PEFT with transformers' Trainer on one.",
    )
    parser.add_argument("--rank", type=int, default=64, help="(default: 64)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default: 512)")
    parser.add_argument("--batch", type=int, default=1, help="rows of a job's step (default: 1)")
    parser.add_argument("--steps", type=int, default=8, help="steps timed, after 2 (default: 8)")
    parser.add_argument("--jobs", type=options.counts, default=(1, 4), help="(default: 1,4)")
    parser.add_argument("--no-peer", action="store_true", help="measure us alone")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")


def run(args: argparse.Namespace) -> int:
    options.require_device(args)
    from loriner.bench.figures import Figures

    figures = Figures(args)
    cases = [(OURS, count) for count in args.jobs] + ([] if args.no_peer else [(PEER, 1)])
    rows, notes = [], []
    for script, count in cases:
        label = LABELS[script]
        try:
            found = run_script(script, {**_job(args), "jobs": count})
        except WorkerError as error:
            notes.append(f"not measured: {label}, {count} jobs: {error}")
            continue
        figures.record("train", {"shape": args.shape, "trainer": label, **found})
        rows.append(cells(label, found))
    figures.table(HEAD, rows)
    for note in notes:
        figures.note(note)
    return 0 if rows else 1


def cells(label: str, found: Mapping[str, Any]) -> Sequence[str]:
    times = sorted(found["step_s"])
    middle = times[len(times) // 2]
    return (
        label,
        str(found["jobs"]),
        f"{found['tokens_per_step'] / middle:,.0f}",
        f"{middle * 1e3:,.0f}",
        f"{(times[-1] - times[0]) / middle:.0%}",
        f"{found['peak_bytes'] / GIB:.2f}",
        f"{found['loaded_bytes'] / GIB:.2f}",
        f"{found['losses'][0]:.3f} to {found['losses'][-1]:.3f}",
    )


def _job(args: argparse.Namespace) -> dict[str, Any]:
    from loriner.bench.shapes import hf_config

    names = ("shape", "device", "seed", "rank", "length", "batch", "steps", "threads")
    chosen = {name: getattr(args, name) for name in names}
    checkpointing = not args.no_checkpointing
    return {**chosen, "config": hf_config(args.shape), "checkpointing": checkpointing}
