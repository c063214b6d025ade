"""`loriner evaluate`: base and adapters on one test file, through a running server.

All questions to all of them are in flight together, so they share the server's batches. Invariant:
a score is over the same rows for each, and comes with its interval.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loriner.commands.remote import Remote, add_flags
from loriner.errors import ConfigError
from loriner.train.data import Prompt, load_prompts, parse_columns
from loriner.train.scoring import SCORERS, mean_interval, wilson
from loriner.train.settings import METRICS

BASE = "base"
FORCE = 100.0  # logit bias that makes a token certain; log-probabilities are those without it


@dataclass(frozen=True, slots=True)
class Score:
    """One line of the table: a share of right answers, or a mean loss in nats a token."""

    adapter: str
    metric: str
    score: float
    low: float  # of the 95 % interval
    high: float
    count: int  # rows, or tokens


def add_command(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="compare base and adapters on a test file",
        description="Ask base and adapters the same questions in one mixed batch, through a running"
        " server, and score the answers with 95 % confidence intervals.",
    )
    parser.add_argument("--data", type=Path, required=True, help="rows, as `loriner train` takes")
    parser.add_argument("--adapters", default=BASE, help="names, `base` among them: a,b,base")
    parser.add_argument("--metric", choices=METRICS, default="exact", help="(default: exact)")
    parser.add_argument("--columns", default="", help="as for `loriner train`")
    parser.add_argument("--limit", type=int, default=0, help="rows, from the first (0: all)")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer (default: 256)")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at a time")
    parser.add_argument("--json", type=Path, help="also append the scores here, as JSON lines")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    if args.concurrency < 1 or args.max_tokens < 1 or args.limit < 0:
        raise ConfigError("concurrency and max_tokens must be at least 1, limit at least 0.")
    adapters = list(dict.fromkeys(a.strip() for a in args.adapters.split(",") if a.strip()))
    if not adapters:
        raise ConfigError("adapters is empty.")
    prompts = load_prompts(args.data, parse_columns(args.columns))
    prompts = prompts[: args.limit or None]
    start = time.perf_counter()
    with Remote(args.url, args.key) as remote:
        scores = Evaluation(remote, args, console).run(prompts, adapters)
    seconds = time.perf_counter() - start
    _show(scores, console)
    count = len(prompts) * len(adapters)
    console.print(f"{count} rows for {len(adapters)} in {seconds:.1f} s ({args.data.name}).")
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(score)) + "\n" for score in scores)
    return 0


class Evaluation:
    """Questions in flight, and what came of them."""

    def __init__(self, remote: Remote, args: argparse.Namespace, console: Console) -> None:
        self._remote, self._console = remote, console
        self._metric: str = args.metric
        self._concurrency: int = args.concurrency
        self._max_tokens: int = args.max_tokens

    def run(self, prompts: Sequence[Prompt], adapters: Sequence[str]) -> list[Score]:
        """Scores in the order of `adapters`."""
        # Row by row, so that neighbours in the queue are different adapters of one prompt.
        if self._metric == "loss":
            rows = self._in_parallel("tokenizing", self._wanted, [(prompt,) for prompt in prompts])
            work = [(*row, adapter) for row in rows for adapter in adapters]
            results = self._in_parallel("asking", self._losses, work)
        else:
            pairs = [(prompt, adapter) for prompt in prompts for adapter in adapters]
            results = self._in_parallel("asking", self._is_right, pairs)
        return [self._score(name, results[i :: len(adapters)]) for i, name in enumerate(adapters)]

    def _in_parallel(
        self, what: str, ask: Callable[..., Any], work: Sequence[tuple[Any, ...]]
    ) -> list[Any]:
        """What `ask` makes of each of `work`, in its order."""
        with contextlib.ExitStack() as stack:
            pool = ThreadPoolExecutor(self._concurrency)
            stack.callback(pool.shutdown, cancel_futures=True)
            progress = stack.enter_context(Progress(console=self._console, transient=True))
            task = progress.add_task(what, total=len(work))
            futures = [pool.submit(ask, *given) for given in work]
            results = []
            for future in futures:
                results.append(future.result())
                progress.advance(task)
        return results

    def _score(self, adapter: str, results: Sequence[Any]) -> Score:
        if self._metric == "loss":
            losses = [loss for row in results for loss in row]
            return Score(adapter, "loss", *mean_interval(losses), len(losses))
        low, high = wilson(sum(results), len(results))
        return Score(adapter, self._metric, sum(results) / len(results), low, high, len(results))

    def _is_right(self, prompt: Prompt, adapter: str) -> bool:
        body: dict[str, Any] = {
            "adapter": adapter,
            "temperature": 0,
            "max_tokens": self._max_tokens,
        }
        if prompt.turns:
            body["messages"] = [turn.message for turn in prompt.turns]
            answer = self._remote.call("POST", "/v1/chat/completions", json=body)
            text = answer["choices"][0]["message"]["content"]
        else:
            body["prompt"] = prompt.text
            answer = self._remote.call("POST", "/v1/completions", json=body)
            text = answer["choices"][0]["text"]
        return SCORERS[self._metric](text, prompt.answer)

    def _losses(self, ids: list[int], wanted: list[int], adapter: str) -> list[float]:
        """-log p of each token of the wanted answer, without its end: one request a token, whose
        prompt is all before it (the server's prefix cache has it already)."""
        losses = []
        for place, token in enumerate(wanted):
            body = {
                "adapter": adapter,
                "prompt": [*ids, *wanted[:place]],
                "temperature": 0,
                "max_tokens": 1,
                "logprobs": 0,
                "logit_bias": {str(token): FORCE},
                "ignore_eos": True,
            }
            answer = self._remote.call("POST", "/v1/completions", json=body)
            losses.append(-answer["choices"][0]["logprobs"]["token_logprobs"][0])
        return losses

    def _wanted(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Token ids of prompt and answer, by the server's own tokenizer and chat template."""
        if not prompt.turns:
            given = self._encode(prompt=prompt.text)
            return given, self._encode(prompt=prompt.answer, add_special_tokens=False)
        messages = [turn.message for turn in prompt.turns]
        given = self._encode(messages=messages)
        answered = [*messages, {"role": "assistant", "content": prompt.answer}]
        whole = self._encode(messages=answered, continue_final_message=True)
        if whole[: len(given)] != given:
            return given, self._encode(prompt=prompt.answer, add_special_tokens=False)
        return given, whole[len(given) :]

    def _encode(self, **asked: Any) -> list[int]:
        ids: list[int] = self._remote.call("POST", "/tokenize", json=asked)["tokens"]
        return ids


def _show(scores: Sequence[Score], console: Console) -> None:
    metric = scores[0].metric
    unit = "tokens" if metric == "loss" else "rows"
    table = Table("adapter", metric, "95 % interval", unit)
    for score in scores:
        shown = (score.score, score.low, score.high)
        value, low, high = (f"{x:.4f}" if metric == "loss" else f"{x:.1%}" for x in shown)
        table.add_row(score.adapter, value, f"{low} to {high}", str(score.count))
    console.print(table)
