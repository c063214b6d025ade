"""`loriner bench cost`: does 4-bit cost anything? Full fine-tuning, LoRA on bf16, QLoRA on NF4.

All variants train on the same rows in the same order, as many steps of the same size, and are
scored on the same test rows; each run is a process of its own. Light to import.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loriner.bench import options
from loriner.bench.worker import WorkerError, run_script
from loriner.errors import ConfigError

if TYPE_CHECKING:
    from loriner.bench.dense_base import Bases

SCRIPT = "cost_case.py"
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train. `base`: of the folders that `dense_base` makes."""

    key: str
    label: str
    base: str


VARIANTS = (
    Variant("full", "full fine-tuning", "dense"),
    Variant("lora", "LoRA on bf16", "dense"),
    Variant("qlora", "QLoRA on NF4", "nf4"),
    Variant("qlora-double", "QLoRA on NF4, double quantisation", "nf4-double"),
)
KEYS = tuple(variant.key for variant in VARIANTS)


def add_command(subparsers: options.Parsers) -> None:
    parser = options.add_plain_parser(
        subparsers,
        "cost",
        run,
        "what 4-bit costs: full fine-tuning, LoRA on bf16 and QLoRA on NF4 on the same rows",
        "Trains every variant on the same rows in the same order, in bf16 on a GPU and fp32 on a "
        "CPU, and scores greedy answers to the test rows. The dense bf16 folder and both NF4 "
        "folders are made from SOURCE.",
    )
    add = parser.add_argument
    add("--source", type=Path, required=True, help="dense or NF4 Hugging Face folder, or GGUF file")
    add("--train", type=Path, required=True, help="training rows, as `loriner train` takes")
    add("--test", type=Path, required=True, help="rows to score on")
    add("--metrics", type=_names, default=("exact",), help="exact, json, number, json.KEY: a,b")
    add("--variants", type=_names, default=KEYS, help=f"of {', '.join(KEYS)} (default: all)")
    add("--folder", type=Path, help="keep the three bases here (default: a temporary folder)")
    add("--runs", type=int, default=1, help="of each variant: seeds SEED, SEED + 1, ... (1)")
    add("--epochs", type=float, default=1.0, help="passes over the rows, where steps is 0 (1)")
    add("--steps", type=int, default=0, help="optimiser steps (0: from epochs)")
    add("--batch", type=int, default=16, help="rows of a step (default: 16)")
    add("--length", type=int, default=512, help="longest row, tokens (default: 512)")
    add("--rank", type=int, default=16, help="on all linears; alpha is twice that (default: 16)")
    add("--learning-rate", type=float, default=1e-3, help="of adapters (default: 1e-3)")
    add("--full-learning-rate", type=float, default=1e-4, help="of all weights (default: 1e-4)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of activations")
    add("--max-rows", type=int, default=0, help="test rows, at even distances (0: all)")
    add("--answer-rows", type=int, default=128, help="rows answered at a time (default: 128)")


def run(args: argparse.Namespace) -> int:
    _check(args)
    options.require_device(args)
    from loriner.bench.dense_base import make_bases
    from loriner.bench.figures import Figures

    figures = Figures(args)
    with tempfile.TemporaryDirectory() as temporary:
        bases = make_bases(args.source, args.folder or Path(temporary))
        found = {v: _runs(v, args, bases, figures) for v in VARIANTS if v.key in args.variants}
    rows = [_cells(v, runs, bases, args.metrics) for v, runs in found.items() if runs]
    figures.table(_head(args.metrics), rows)
    figures.note(_note(args, bases))
    return 0 if all(found.values()) else 1


def _runs(
    variant: Variant, args: argparse.Namespace, bases: Bases, figures: Any
) -> list[dict[str, Any]]:
    """What each run of a variant came to; one that fails is told and left out."""
    runs = []
    for seed in range(args.seed, args.seed + args.runs):
        try:
            found = run_script(SCRIPT, _job(variant, args, bases, seed))
        except WorkerError as error:
            figures.note(f"not measured: {variant.label}, seed {seed}: {error}")
            continue
        off = bases.errors[variant.base]
        figures.record("cost", {"variant": variant.key, "seed": seed, "off": off, **found})
        runs.append(found)
    return runs


def _job(variant: Variant, args: argparse.Namespace, bases: Bases, seed: int) -> dict[str, Any]:
    rate = args.full_learning_rate if variant.key == "full" else args.learning_rate
    names = ("device", "dtype", "threads", "max_rows", "answer_rows", "metrics")
    return {
        **{name: getattr(args, name) for name in names},
        "variant": variant.key,
        "base": str(bases.folders[variant.base].resolve()),
        "test": str(args.test.resolve()),
        "settings": {
            "name": variant.key,
            "data": str(args.train.resolve()),
            "learning_rate": rate,
            "rank": args.rank,
            "alpha": 2.0 * args.rank,
            "batch": args.batch,
            "max_length": args.length,
            "steps": args.steps,
            "epochs": args.epochs,
            "seed": seed,
        },
    }


def _head(metrics: Sequence[str]) -> Sequence[str]:
    scores = [text for metric in metrics for text in (metric, "95 % or range")]
    return ("variant", *scores, "weights off", "trainable", "peak GiB", "train s", "loss")


def _cells(
    variant: Variant, runs: Sequence[Mapping[str, Any]], bases: Bases, metrics: Sequence[str]
) -> Sequence[str]:
    first, last = (_mean([r[name] for r in runs]) for name in ("first_loss", "last_loss"))
    return (
        variant.label,
        *(text for metric in metrics for text in _score(runs, metric)),
        f"{bases.errors[variant.base]:.2%}",
        f"{runs[0]['trainable'] / runs[0]['parameters']:.2%}",
        f"{max(r['peak_bytes'] for r in runs) / GIB:.2f}",
        f"{_mean([r['train_s'] for r in runs]):.1f}",
        f"{first:.3f} to {last:.3f}",
    )


def _score(runs: Sequence[Mapping[str, Any]], metric: str) -> tuple[str, str]:
    """The share of right answers; its interval over rows, or the range of several runs."""
    from loriner.train.scoring import wilson

    shares = [r["right"][metric] / r["asked"] for r in runs]
    low, high = wilson(runs[0]["right"][metric], runs[0]["asked"])
    if len(runs) > 1:
        low, high = min(shares), max(shares)
    return f"{_mean(shares):.1%}", f"{low:.1%} to {high:.1%}"


def _note(args: argparse.Namespace, bases: Bases) -> str:
    what = "the GPU's peak" if args.device == "cuda" else "the process's peak, imports included"
    return (
        f"{args.train.name} and {args.test.name}; batch {args.batch}, rank {args.rank}; learning"
        f" rate {args.learning_rate:g}, all weights {args.full_learning_rate:g}; AdamW; memory is"
        f" {what}, while training. All weights are trained in f32, with products in the dtype of"
        f" activations. `weights off`: ||W - NF4(W)|| / ||W||. Note: {bases.origin}."
    )


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError for what no run could do."""
    from loriner.train.scoring import scorer
    from loriner.train.settings import JobConfig

    if unknown := [key for key in args.variants if key not in KEYS]:
        raise ConfigError(f"variants: {unknown[0]!r} is not one of {', '.join(KEYS)}.")
    for metric in args.metrics:
        scorer(metric)
    for name in ("source", "train", "test"):
        if not getattr(args, name).exists():
            raise ConfigError(f"{name}: there is no {getattr(args, name)}.")
    if args.runs < 1 or args.answer_rows < 1 or args.max_rows < 0:
        raise ConfigError("runs and answer_rows must be at least 1, max_rows at least 0.")
    for rate in (args.learning_rate, args.full_learning_rate):
        JobConfig(
            name="cost",
            data=args.train,
            learning_rate=rate,
            rank=args.rank,
            batch=args.batch,
            max_length=args.length,
            steps=args.steps,
            epochs=args.epochs,
            seed=args.seed + args.runs - 1,
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
