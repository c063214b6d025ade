"""`loriner bench fairness`: what a quiet tenant feels of another that floods the server.

Starts `loriner serve` with keys of two tenants, each with adapters of its own. The quiet one asks
one thing after another; the other keeps the queue full. Invariant: what it feels alone and in the
flood is measured in turns, on one server, so that a busy machine weighs on both alike.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from loriner.bench import options
from loriner.bench.clients import flooding, stream
from loriner.bench.serve import percentile, publish
from loriner.bench.served import serving
from loriner.errors import ConfigError

if TYPE_CHECKING:
    from loriner.bench.drive import Prompts

HEAD = ("prompt", "first token ms, alone p50", "p95", "in the flood p50", "p95", "p95 / p95")
LOAD_HEAD = ("prompt", "tokens/s in the flood", "preemptions", "waiting")
OPERATOR = "operator"
FLOOD_NEW = (16, 128)  # tokens of an answer of the flood, drawn between
PAUSE_S = 0.2  # at most, between two requests of the quiet tenant
SETTLE_S = 3.0  # until a flood runs and waits
FLOOD_EACH = 50  # prompts of one stream of a flood, before it begins anew


def add_command(subparsers: options.Parsers) -> None:
    parser = options.add_parser(
        subparsers,
        "fairness",
        run,
        "time to first token of one tenant, alone and while another floods the server",
        "Writes a random base (or takes --base) and adapters, starts `loriner serve` with two"
        " tenants' keys, and asks in turns as the quiet tenant alone and in the other's flood. Each"
        " prompt is new. Further flags for the server stand after `--`.",
    )
    options.add_ranks(parser)
    parser.add_argument(
        "--prompts",
        type=options.counts,
        default=(32, 128, 512),
        help="tokens of the quiet tenant's prompts (default: 32,128,512)",
    )
    parser.add_argument("--asked", type=int, default=30, help="prompts in each turn (default: 30)")
    parser.add_argument("--turns", type=int, default=3, help="alone and flooded (default: 3)")
    parser.add_argument("--new", type=int, default=16, help="tokens of its answers (default: 16)")
    parser.add_argument("--streams", type=int, default=64, help="of the flood (default: 64)")
    parser.add_argument(
        "--flood-prompt", type=int, default=64, help="tokens of the flood's prompts (default: 64)"
    )
    parser.add_argument("--adapters", type=int, default=8, help="of the flood (default: 8)")
    parser.add_argument("--base", type=Path, help="folder of `loriner bench base` (default: made)")
    parser.add_argument("--folder", type=Path, help="for base and adapters (default: temporary)")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="further flags of `serve`")


def run(args: argparse.Namespace) -> int:
    options.require_device(args)
    if args.asked < 2:
        raise ConfigError("asked: at least 2 in each turn.")
    from loriner.bench.base_folder import write_base
    from loriner.bench.drive import Prompts
    from loriner.bench.figures import Figures
    from loriner.bench.random_adapters import draw

    base, adapters = draw(args)
    figures = Figures(args)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if args.base is None:
            write_base(base, folder / "base")
        keys = make_keys(folder / "store")
        flags = ["--model", str(args.base or folder / "base"), "--device", args.device]
        flags += ["--num-threads", str(args.threads), "--api-key", OPERATOR, *args.flags]
        with serving(flags, folder) as port:
            names = [*(f"flood/{i}" for i in range(args.adapters)), "quiet/own"]
            publish(port, adapters, names, folder / "uploads", key=OPERATOR, num_writers=1)
            site = Site(port, keys, args, Prompts(base.config.vocab_size, seed=args.seed))
            measured = [site.measure(length) for length in args.prompts]
    for one in measured:
        figures.record("fairness", {"shape": args.shape, "streams": args.streams, **one})
    figures.table(HEAD, [cells(one) for one in measured])
    figures.table(LOAD_HEAD, [load_cells(one) for one in measured])
    return 0


def make_keys(store: Path) -> dict[str, str]:
    """A key for each tenant, by its name."""
    from loriner.api.tenants import Tenants

    store.mkdir()
    tenants = Tenants(store)
    return {who: tenants.create_key(who, ["infer"])[1] for who in ("quiet", "flood")}


class Site:
    """A server with two tenants, and what each asks."""

    def __init__(
        self, port: int, keys: dict[str, str], args: argparse.Namespace, prompts: Prompts
    ) -> None:
        self._port, self._keys, self._args, self._prompts = port, keys, args, prompts
        self._draw = random.Random(args.seed)

    def measure(self, length: int) -> dict[str, float]:
        """Figures of prompts of so many tokens. Times are ms."""
        self._ask(length)
        alone: list[float] = []
        flooded: list[float] = []
        loads: list[dict[str, float]] = []
        for turn in range(self._args.turns):
            alone += self._ask(length)
            with self._flood():
                before = self._metrics()
                flooded += self._ask(length)
                loads.append(_between(before, self._metrics()))
            sys.stderr.write(f"prompts of {length}: turn {turn + 1} of {self._args.turns}\n")
        return {"prompt": length, **_of_times(alone, flooded), **_mean(loads)}

    def _ask(self, length: int) -> list[float]:
        """Milliseconds to the first token, one request after another, at random moments."""
        asked = [self._body("own", length, self._args.new) for _ in range(self._args.asked)]
        answers = stream(self._port, [asked], 1, self._keys["quiet"], pause_s=PAUSE_S)
        return [1e3 * answer.first for answer in answers]

    @contextmanager
    def _flood(self) -> Iterator[None]:
        """Another tenant's requests, more than can run, while the block runs."""
        streams = [
            [self._flood_body() for _ in range(FLOOD_EACH)] for _ in range(self._args.streams)
        ]
        with flooding(self._port, streams, 2, self._keys["flood"]):
            time.sleep(SETTLE_S)
            yield
        self._wait_until_idle()

    def _flood_body(self) -> dict[str, object]:
        name, new = str(self._draw.randrange(self._args.adapters)), self._draw.randint(*FLOOD_NEW)
        return self._body(name, self._args.flood_prompt, new)

    def _wait_until_idle(self) -> None:
        while self._metrics()["waiting"] + self._metrics()["running"]:
            time.sleep(0.1)

    def _body(self, adapter: str, length: int, new: int) -> dict[str, object]:
        prompt = list(self._prompts.one(length))
        asked = {"adapter": adapter, "prompt": prompt, "max_tokens": new}
        return {**asked, "temperature": 0, "ignore_eos": True}

    def _metrics(self) -> dict[str, float]:
        """What the engine has counted, and when."""
        url = f"http://127.0.0.1:{self._port}/metrics"
        answer = httpx.get(url, headers={"authorization": f"Bearer {OPERATOR}"}, timeout=10)
        answer.raise_for_status()
        found = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if line[0] != "#")
        names = {
            "prompt_tokens": "loriner_engine_prompt_tokens_total",
            "output_tokens": "loriner_engine_output_tokens_total",
            "preemptions": "loriner_preemptions_total",
            "waiting": "loriner_sequences_waiting",
            "running": "loriner_sequences_running",
        }
        values = {name: float(found[metric]) for name, metric in names.items()}
        return {**values, "at": time.monotonic()}


def _between(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    seconds = after["at"] - before["at"]
    return {
        "prompt_tokens_per_s": (after["prompt_tokens"] - before["prompt_tokens"]) / seconds,
        "output_tokens_per_s": (after["output_tokens"] - before["output_tokens"]) / seconds,
        "preemptions": after["preemptions"] - before["preemptions"],
        "waiting": after["waiting"],
    }


def _mean(loads: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(load[key] for load in loads) for key in loads[0]}


def _of_times(alone: list[float], flooded: list[float]) -> dict[str, float]:
    values = {}
    for name, times in (("alone", sorted(alone)), ("flooded", sorted(flooded))):
        values[f"{name}_p50_ms"] = percentile(times, 50)
        values[f"{name}_p95_ms"] = percentile(times, 95)
    return {**values, "ratio": values["flooded_p95_ms"] / values["alone_p95_ms"]}


def cells(one: dict[str, float]) -> tuple[str, ...]:
    times = (f"{one[f'{who}_{p}_ms']:.0f}" for who in ("alone", "flooded") for p in ("p50", "p95"))
    return (f"{one['prompt']:.0f}", *times, f"{one['ratio']:.2f}")


def load_cells(one: dict[str, float]) -> tuple[str, ...]:
    rate = f"{one['prompt_tokens_per_s']:.0f} + {one['output_tokens_per_s']:.0f}"
    return (f"{one['prompt']:.0f}", rate, f"{one['preemptions']:.0f}", f"{one['waiting']:.0f}")
