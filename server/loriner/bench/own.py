"""Our engine as a worker: the peers' job on the loop that `serve` runs, without the doors.

A script like theirs (`python own.py JOB OUT`). The prefix cache is off: every run prefills anew.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loriner.engine.engine import Engine

BASE = -1
# note, and which adapter each row uses
CASES: tuple[tuple[str, list[int]], ...] = (
    ("", [BASE]),
    ("", [BASE] * 4),
    ("", [BASE] * 8),
    ("", [0]),
    ("", [0, 1, 2, 3]),
    ("", [0, 1, 2, 3, 4, 5, 6, 7]),
    ("2 base, 3 of one, 3 more", [BASE, 0, 1, 0, 2, BASE, 0, 3]),
)


def build(job: dict[str, Any]) -> Engine:
    """The engine on the job's base; generation "3" is the job's adapter number 3."""
    from tokenizers import Tokenizer

    from loriner.adapters.formats import peft
    from loriner.adapters.memory import Weights
    from loriner.config import EngineConfig
    from loriner.engine.engine import Engine
    from loriner.engine.runner import open_runner

    config = EngineConfig(
        model=Path(job["model"]),
        device="cpu",
        num_threads=job["threads"],
        prefix_cache=False,
        max_step_tokens=max(512, sum(map(len, job["prompts"]))),
    )
    runner = open_runner(config)
    modules = runner.model_config.modules()

    def source(generation: str) -> Weights:
        folder = Path(job["adapters"][int(generation)])
        return runner.pack(peft.load(folder, modules))

    tokenizer = Tokenizer.from_file(str(config.model / "tokenizer.json"))
    return Engine(config, runner, tokenizer, source)


def measure(engine: Engine, prompts: list[list[int]], picks: list[int], num_new: int) -> Any:
    """Submit all rows at once and step until they end."""
    from loriner.bench import drive
    from loriner.core import Request, SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
    start = time.monotonic()
    for row, pick in enumerate(picks):
        generation = None if pick == BASE else str(pick)
        request = Request(str(row), tuple(prompts[row]), sampling, generation, arrival_s=start)
        engine.submit(request)
    answers: list[list[int]] = [[] for _ in picks]
    prefilled = None
    while engine.has_work:
        for event in drive.step(engine):
            if event.error is not None:
                raise RuntimeError(event.error)
            answers[int(event.request_id)].extend(event.token_ids)
        if prefilled is None and all(answers):
            prefilled = time.monotonic()
            behind = max(map(len, answers)) - 1  # decode steps that ran before the last prefill
    assert prefilled is not None and behind == 0 and all(len(a) == num_new for a in answers)
    end = time.monotonic()
    return {
        "start": start,
        "prefill_s": prefilled - start,
        "decode_s": end - prefilled,
        "answer": answers[0],
    }


def load_adapters(engine: Engine, prompts: list[list[int]], count: int) -> None:
    """Bring every adapter to a seat, so that no run pays for it."""
    for pick in range(count):
        measure(engine, prompts, [pick], 1)


def main(job: dict[str, Any]) -> list[dict[str, Any]]:
    engine = build(job)
    prompts, num_new = job["prompts"], job["num_new"]
    load_adapters(engine, prompts, len(job["adapters"]))
    for _, picks in CASES:
        measure(engine, prompts, picks, 4)
    cases: list[dict[str, Any]] = [
        {"rows": len(picks), "adapters": len(set(picks) - {BASE}), "note": note, "runs": []}
        for note, picks in CASES
    ]
    for _ in range(job["repeats"]):  # in turns, so that a busy moment hits no case alone
        for case, (_, picks) in zip(cases, CASES, strict=True):
            case["runs"].append(measure(engine, prompts, picks, num_new))
    engine.close()
    return cases


if __name__ == "__main__":
    job_file, out_file = map(Path, sys.argv[1:])
    out_file.write_text(json.dumps(main(json.loads(job_file.read_text()))))
