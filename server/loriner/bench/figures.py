"""What a device benchmark prints: the machine and its limits, tables, and the same as JSON lines.

Knows no benchmark. Invariant: every figure of a run stands in a file beside the machine, commit and
date it was measured with.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loriner.bench import machine
from loriner.bench.report import markdown
from loriner.bench.timing import Stopwatch, matmul_rate, read_bandwidth


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device can do, measured now."""

    read_bytes_per_s: float  # torch.sum over 4 GiB
    flop_per_s: float  # bf16 matmul of 8192^3

    def floor_ms(self, num_bytes: float) -> float:
        """The least time that `num_bytes` take to be read."""
        return 1e3 * num_bytes / self.read_bytes_per_s


class Figures:
    """The output of one run. `watch` times the device that its flags name."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.watch = Stopwatch(args.device)
        self._file: Path | None = args.json
        described = describe(args, self.watch)
        self._write("  ".join(f"{key}={value}" for key, value in described.items()))
        self._append({"kind": "machine", **described})

    def measure_limits(self) -> Limits:
        limits = Limits(read_bandwidth(self.watch), matmul_rate(self.watch))
        self._write(
            f"read {limits.read_bytes_per_s / 1e9:,.0f} GB/s, matmul"
            f" {limits.flop_per_s / 1e12:,.1f} TFLOP/s (measured now)"
        )
        names = ("read_bytes_per_s", "flop_per_s")
        self._append({"kind": "limits", **{name: getattr(limits, name) for name in names}})
        return limits

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._write(markdown(tuple(head), [tuple(row) for row in rows]))

    def note(self, text: str) -> None:
        self._write(text)

    def record(self, kind: str, values: Mapping[str, object], *, echo: bool = True) -> None:
        """One JSON line; `echo` also on stderr, so that a run that is cut off has shown it."""
        self._append({"kind": kind, **values})
        if echo:
            sys.stderr.write(f"{kind}: {json.dumps(_rounded(values))}\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text + "\n\n")
        sys.stdout.flush()

    def _append(self, values: Mapping[str, object]) -> None:
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps(values) + "\n")


def describe(args: argparse.Namespace, watch: Stopwatch) -> dict[str, str]:
    """The machine, its GPU, the command and the commit."""
    described = machine.describe(args.threads)
    if args.commit:
        described["commit"] = args.commit
    if watch.on_gpu:
        described |= describe_gpu(watch)
    return {**described, "command": "loriner " + shlex.join(sys.argv[1:])}


def describe_gpu(watch: Stopwatch) -> dict[str, str]:
    import torch

    properties = torch.cuda.get_device_properties(watch.device)
    return {
        "gpu": properties.name,
        "gpu_memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "gpu_sms": str(properties.multi_processor_count),
        "gpu_arch": f"sm_{properties.major}{properties.minor}",
        "cuda": str(torch.version.cuda),
    }


def _rounded(values: Mapping[str, object]) -> dict[str, object]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
