"""What constrained rows cost: the time of masks beside a step, and of what the step waits for.

`python -m tests.engine.mask_cost [FOLDER]` prints microseconds a token over the hundred schemas of
`answer_schemas`, walked at random, with the tokenizer of the base in FOLDER.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from loriner.core import Sequence
from loriner.engine.grammars import Constraint, Grammars, Kind
from loriner.engine.guides import Guide, Guides
from loriner.model.config import ModelConfig
from tests.answer_schemas import cases
from tests.fakes import make_request

BATCHES = (1, 8, 32)
MAX_TOKENS = 160
Times = list[float]


def guides_of(guides: Guides, grammars: Seq[str]) -> list[Guide]:
    """One for each grammar, at its beginning."""
    sequences = []
    for i, grammar in enumerate(grammars):
        request = make_request(request_id=str(i), grammar=grammar)
        sequences.append(Sequence(request, 0, i))
        guides.want(sequences[-1:])
    guides._compiler.submit(int).result()
    guides.take()
    return [sequence.guide for sequence in sequences if isinstance(sequence.guide, Guide)]


def walk(guides: Guides, batch: list[Guide], rng: random.Random, times: dict[str, Times]) -> None:
    """Random tokens until all have ended; times are for the whole batch."""
    left, steps = list(batch), 0
    while left and steps < MAX_TOKENS:
        began = time.perf_counter()
        guides.begin(left, as_ids=True)
        launched = time.perf_counter()
        rows = [guide.allowed() for guide in left]
        ready = time.perf_counter()
        for guide, row in zip(left, rows, strict=True):
            guide.accept(int(rng.choice(row)))
        times["accept"].append((time.perf_counter() - ready) / len(left))
        times["begin"].append(launched - began)
        times["mask"].append((ready - began) / len(left))
        times["step"].append(ready - began)
        left = [guide for guide in left if not guide.finished]
        steps += 1


def show(name: str, times: Times) -> str:
    p50, p95 = np.percentile(times, [50, 95]) * 1e6
    return f"{name} p50 {p50:.0f} p95 {p95:.0f} max {max(times) * 1e6:.0f} us"


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-nf4")
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    checker = Grammars(folder, config.vocab_size, config.eos_token_ids)
    began = time.perf_counter()
    checker.warm().result()
    lines = [f"trie of {config.vocab_size} tokens: {time.perf_counter() - began:.2f} s"]
    grammars, compiling = [], []
    for case in cases():
        constraint = Constraint(Kind.JSON, json.dumps(case.schema), "schema")
        began = time.perf_counter()
        grammars.append(asyncio.run(checker.compile(constraint)))
        compiling.append(time.perf_counter() - began)
    lines.append(show("compile and check at the door:", compiling))
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).to_str()
    guides = Guides(text, config.vocab_size, config.eos_token_ids, lambda: None)
    rng = random.Random(0)
    for size in BATCHES:
        times: dict[str, Times] = {name: [] for name in ("begin", "mask", "step", "accept")}
        for start in range(0, len(grammars), size):
            walk(guides, guides_of(guides, grammars[start : start + size]), rng, times)
        lines.append(f"batch {size}: " + "; ".join(show(*one) for one in times.items()))
    guides.close()
    checker.close()
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
