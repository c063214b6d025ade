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
from loriner.train.scoring import mean_interval, scorer, wilson

BASE = "base"
LOSS = "loss"


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
    parser.add_argument(
        "--metric",
        type=metrics_of,
        default=("exact",),
        help="exact, json, json.KEY, number, or several of one answer: json,json.intent; or loss,"
        " of the answer's tokens without its end (default: exact)",
    )
    parser.add_argument("--columns", default="", help="as for `loriner train`")
    parser.add_argument("--limit", type=int, default=0, help="rows, from the first (0: all)")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer (default: 256)")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at a time")
    parser.add_argument("--json", type=Path, help="also append the scores here, as JSON lines")
    add_flags(parser)
    parser.set_defaults(run=run)


def metrics_of(text: str) -> tuple[str, ...]:
    """Raises ArgumentTypeError for what is no metric, or asks for answers and for a loss."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    try:
        for name in names:
            if name != LOSS:
                scorer(name)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{error} Or it is loss.") from None
    if LOSS in names and len(names) > 1:
        raise argparse.ArgumentTypeError("loss stands alone: it asks for no answers.")
    return names


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
        self._metrics: Sequence[str] = args.metric
        self._scorers = [scorer(name) for name in self._metrics if name != LOSS]
        self._concurrency: int = args.concurrency
        self._max_tokens: int = args.max_tokens

    def run(self, prompts: Sequence[Prompt], adapters: Sequence[str]) -> list[Score]:
        """Scores in the order of `adapters`, each by all metrics."""
        # Row by row, so that neighbours in the queue are different adapters of one prompt.
        if not self._scorers:
            rows = self._in_parallel("tokenizing", self._wanted, [(prompt,) for prompt in prompts])
            work = [(*row, adapter) for row in rows for adapter in adapters]
            results = self._in_parallel("scoring", self._losses, work)
            return [_loss(name, results[i :: len(adapters)]) for i, name in enumerate(adapters)]
        pairs = [(prompt, adapter) for prompt in prompts for adapter in adapters]
        results = self._in_parallel("asking", self._are_right, pairs)
        return [
            _share(name, metric, [row[place] for row in results[i :: len(adapters)]])
            for i, name in enumerate(adapters)
            for place, metric in enumerate(self._metrics)
        ]

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

    def _are_right(self, prompt: Prompt, adapter: str) -> list[bool]:
        """By each metric."""
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
        return [is_right(text, prompt.answer) for is_right in self._scorers]

    def _losses(self, ids: list[int], wanted: list[int], adapter: str) -> list[float]:
        """-log p of each token of the wanted answer, without its end; the very first of a text has
        none."""
        body = {
            "adapter": adapter,
            "prompt": [*ids, *wanted],
            "max_tokens": 0,
            "echo": True,
            "logprobs": 0,
        }
        answer = self._remote.call("POST", "/v1/completions", json=body)
        logprobs: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
        return [-logprob for logprob in logprobs[max(1, len(ids)) :]]

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


def _loss(adapter: str, rows: Sequence[Sequence[float]]) -> Score:
    return Score(adapter, LOSS, *mean_interval(rows), sum(map(len, rows)))


def _share(adapter: str, metric: str, are_right: Sequence[bool]) -> Score:
    right, count = sum(are_right), len(are_right)
    return Score(adapter, metric, right / count, *wilson(right, count), count)


def _show(scores: Sequence[Score], console: Console) -> None:
    table = Table("adapter", "metric", "score", "95 % interval", "of")
    for score in scores:
        is_loss = score.metric == LOSS
        shown = (score.score, score.low, score.high)
        value, low, high = (f"{x:.4f}" if is_loss else f"{x:.1%}" for x in shown)
        count = f"{score.count} {'tokens' if is_loss else 'rows'}"
        table.add_row(score.adapter, score.metric, value, f"{low} to {high}", count)
    console.print(table)
