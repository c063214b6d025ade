"""What `loriner evaluate` asks of a server, which is scripted here."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import httpx
import pytest
from rich.console import Console

from loriner.commands.evaluate import Evaluation, metrics_of
from loriner.commands.remote import Remote
from loriner.train.data import Prompt

PROMPTS = [Prompt((), text, answer) for text, answer in (("a", "bc"), ("de", "f"))]
LOSSES = {"base": 2.0, "one": 1.0}


class Scripted:
    """A byte is a token; each adapter finds every token as likely."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked[request.url.path] += 1
        body: dict[str, Any] = json.loads(request.content)
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": list(body["prompt"].encode())})
        if body["max_tokens"] == 0:
            assert (body["echo"], body["logprobs"]) == (True, 0)
        found: list[float | None] = [-LOSSES[body["adapter"]]] * len(body["prompt"])
        logprobs = {"token_logprobs": [None, *found[1:]]}
        return httpx.Response(200, json={"choices": [{"logprobs": logprobs, "text": "bc"}]})


def evaluate(server: Scripted, *metric: str) -> list[Any]:
    args = argparse.Namespace(metric=metric, concurrency=4, max_tokens=8)
    transport = httpx.MockTransport(server)
    with Remote("http://127.0.0.1:1", transport=transport) as remote:
        console = Console(quiet=True)
        return Evaluation(remote, args, console).run(PROMPTS, ["base", "one"])


def test_a_loss_takes_one_request_a_row_and_adapter() -> None:
    server = Scripted()
    base, one = evaluate(server, "loss")

    assert server.asked == {"/tokenize": 2 * len(PROMPTS), "/v1/completions": 2 * len(PROMPTS)}
    assert (base.score, one.score) == (2.0, 1.0)
    assert base.count == one.count == len("bcf")


def test_a_score_is_the_share_of_right_answers() -> None:
    server = Scripted()
    scores = evaluate(server, "exact")

    assert [s.score for s in scores] == pytest.approx([0.5, 0.5])
    assert server.asked == {"/v1/completions": 4}


def test_one_answer_is_scored_by_every_metric() -> None:
    server = Scripted()
    scores = evaluate(server, "exact", "number")

    assert [(s.adapter, s.metric, s.score) for s in scores] == [
        ("base", "exact", 0.5),
        ("base", "number", 0.0),
        ("one", "exact", 0.5),
        ("one", "number", 0.0),
    ]
    assert server.asked == {"/v1/completions": 4}


@pytest.mark.parametrize("text", ["exakt", "json.", "json,loss", ""])
def test_what_is_no_metric_is_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="loss"):
        metrics_of(text)


def test_metrics_are_named_in_a_list() -> None:
    assert metrics_of("json, json.intent,json") == ("json", "json.intent")
