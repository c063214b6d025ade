"""A fine-tuning job on a server, over HTTP as its clients see it: rows for it, its life, its speed.

Knows no streams. Invariant: the job is cancelled when its block ends, however it ends.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from loriner.bench.prompts import QUESTIONS
from loriner.errors import LorinerError

PAGE = 100  # events
POLL_S = 0.2
START_S = 540.0  # until it trains: a large base is loaded once more
ENDED = ("succeeded", "failed", "cancelled")


class JobEndedError(LorinerError):
    """It trains no more, or did not begin to."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step, when it was done."""

    at: float  # seconds since 1970
    num_tokens: int


class FineTuning:
    """One job, from its creation on."""

    def __init__(self, http: httpx.Client, file: Path, settings: Mapping[str, object]) -> None:
        """Upload `file` and train the served base on it. `settings`: of `loriner train`."""
        self._http = http
        with file.open("rb") as rows:
            form = {"purpose": "fine-tune"}
            uploaded = _ok(http.post("/v1/files", files={"file": (file.name, rows)}, data=form))
        base = _ok(http.get("/v1/models"))["data"][0]["id"]
        asked = {"model": base, "training_file": uploaded["id"], "loriner": dict(settings)}
        self._url = (
            f"/v1/fine_tuning/jobs/{_ok(http.post('/v1/fine_tuning/jobs', json=asked))['id']}"
        )

    def wait(self, num_steps: int) -> None:
        """Until it has done so many steps. Raises JobEndedError."""
        deadline = time.monotonic() + START_S
        while len(self.steps()) < num_steps:
            self.check()
            if time.monotonic() > deadline:
                raise JobEndedError(f"the training job did not begin within {START_S:.0f} s")
            time.sleep(POLL_S)

    def check(self) -> None:
        """Raises JobEndedError when it has ended, with its own words."""
        job = _ok(self._http.get(self._url))
        if job["status"] in ENDED:
            why = f": {job['error']['message']}" if job["error"] else ""
            raise JobEndedError(f"the training job has {job['status']}{why}")

    def steps(self, since: float = 0.0) -> list[Step]:
        """In their order: the last one before `since`, seconds since 1970, and all after it."""
        found: list[Step] = []
        for data in self._metrics():
            if "train_loss" in data:
                found.append(Step(data["at"], data["num_tokens"]))
                if data["at"] <= since:
                    break
        return found[::-1]

    def cancel(self) -> None:
        """Returns when its process is gone."""
        if _ok(self._http.get(self._url))["status"] not in ENDED:
            _ok(self._http.post(f"{self._url}/cancel"))

    def _metrics(self) -> Iterator[dict[str, Any]]:
        """Newest first."""
        asked: dict[str, Any] = {"limit": PAGE}
        has_more = True
        while has_more:
            page = _ok(self._http.get(f"{self._url}/events", params=asked))
            yield from (event["data"] for event in page["data"] if event["type"] == "metrics")
            has_more, asked["after"] = page["has_more"], page["last_id"]


@contextmanager
def training(port: int, file: Path, settings: Mapping[str, object]) -> Iterator[FineTuning]:
    """A job while the block runs."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as http:
        job = FineTuning(http, file, settings)
        try:
            yield job
        finally:
            job.cancel()


def tokens_per_s(steps: Sequence[Step], begin: float, end: float) -> float:
    """From the last step before `begin` to the last one before `end`; 0 where none ended in
    between. Both are seconds since 1970."""
    seen = [step for step in steps if step.at <= end]
    first = max((i for i, step in enumerate(seen) if step.at <= begin), default=0)
    counted = seen[first + 1 :]
    if not counted:
        return 0.0
    return sum(step.num_tokens for step in counted) / (counted[-1].at - seen[first].at)


def write_rows(file: Path, num_rows: int, length: int, seed: int) -> None:
    """Pairs of a short prompt and random words, JSONL. Each is longer than `length` tokens, as a
    word takes one at least, so that a `max_length` of it makes all rows of one size."""
    words = sorted({word for question in QUESTIONS for word in question.split()})
    draw = random.Random(seed)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(num_rows):
            answer = " ".join(draw.choices(words, k=length))
            out.write(json.dumps({"prompt": "Go on: ", "completion": answer}) + "\n")


def _ok(answer: httpx.Response) -> dict[str, Any]:
    """Its body. Raises JobEndedError with the server's words."""
    if answer.is_error:
        raise JobEndedError(f"the server refused: {answer.text[:500]}")
    body: dict[str, Any] = answer.json()
    return body
