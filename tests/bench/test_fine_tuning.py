"""A fine-tuning job as a benchmark drives it, on a door that is made of its answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from loriner.bench.fine_tuning import FineTuning, JobEndedError, Step, tokens_per_s, write_rows

STEPS = [Step(at, 10) for at in (1.0, 2.0, 4.0, 7.0)]


@pytest.mark.parametrize(
    ("begin", "end", "rate"),
    [
        (1.5, 4.5, 20 / 3),  # from the step at 1 to that at 4
        (2.0, 7.0, 20 / 5),
        (0.0, 9.0, 30 / 6),
        (4.5, 6.9, 0.0),
        (8.0, 9.0, 0.0),
        (0.0, 0.5, 0.0),
    ],
)
def test_a_rate_is_of_the_whole_steps_in_a_window(begin: float, end: float, rate: float) -> None:
    assert tokens_per_s(STEPS, begin, end) == pytest.approx(rate)


class Door:
    """Answers as the server does, of a job with so many steps; one event a second."""

    def __init__(self, num_steps: int, status: str = "running", error: str = "") -> None:
        self.status, self.error, self.asked = status, error, list[str]()
        self.events = [self.event(i, {"step": i, "train_loss": 1.0}) for i in range(num_steps)]
        self.events.append(self.event(num_steps, {"step": num_steps, "full_valid_loss": 1.0}))

    def event(self, number: int, data: dict[str, Any]) -> dict[str, Any]:
        more = {"num_tokens": 7, "at": float(number)} if "train_loss" in data else {}
        return {"id": f"event-{number}", "type": "metrics", "data": data | more}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(f"{request.method} {request.url.path}")
        if request.url.path.endswith("/events"):
            return httpx.Response(200, json=self.page(request.url.params))
        if request.url.path.endswith("/cancel"):
            self.status = "cancelled"
        error = {"message": self.error} if self.error else None
        job = {"id": "ftjob-1", "status": self.status, "error": error}
        return httpx.Response(200, json=job | {"data": [{"id": "base"}]})

    def page(self, asked: httpx.QueryParams) -> dict[str, Any]:
        newest = self.events[::-1]
        start = [e["id"] for e in newest].index(asked["after"]) + 1 if "after" in asked else 0
        end = start + int(asked["limit"])
        shown = newest[start:end]
        return {"data": shown, "has_more": end < len(newest), "last_id": shown[-1]["id"]}


def open_job(door: Callable[[httpx.Request], httpx.Response], tmp_path: Path) -> FineTuning:
    write_rows(tmp_path / "rows.jsonl", 3, 20, seed=0)
    http = httpx.Client(transport=httpx.MockTransport(door), base_url="http://door")
    return FineTuning(http, tmp_path / "rows.jsonl", {"rank": 2})


def test_steps_are_read_back_to_a_time_in_their_order(tmp_path: Path) -> None:
    door = Door(250)
    job = open_job(door, tmp_path)
    door.asked.clear()
    found = job.steps(since=100.5)

    assert [step.at for step in found] == [float(i) for i in range(100, 250)]
    assert len(door.asked) == 2, "older pages are not asked for"
    assert len(job.steps()) == 250


def test_a_job_that_failed_is_told_in_its_own_words(tmp_path: Path) -> None:
    job = open_job(Door(0, "failed", "all rows are bad"), tmp_path)

    with pytest.raises(JobEndedError, match="job has failed: all rows are bad"):
        job.wait(1)
    with pytest.raises(JobEndedError, match="refused: no room"):
        open_job(lambda request: httpx.Response(429, text="no room"), tmp_path)


@pytest.mark.parametrize("status", ["running", "succeeded"])
def test_only_a_job_that_runs_is_cancelled(status: str, tmp_path: Path) -> None:
    door = Door(1, status)
    open_job(door, tmp_path).cancel()

    assert ("POST /v1/fine_tuning/jobs/ftjob-1/cancel" in door.asked) == (status == "running")


def test_rows_have_more_words_than_a_row_may_have_tokens(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 4, 30, seed=1)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]

    assert len({row["completion"] for row in rows}) == 4
    assert all(len(row["completion"].split()) >= 30 for row in rows)
