"""How fast a batch is of which half the rows are constrained, beside the same batch all free.

`python -m tests.engine.mixed_speed [FOLDER] [DEVICE]` prints tokens a second of both, medians of
batches that take turns, with the base in FOLDER on DEVICE (cpu). Every row has as many tokens.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from statistics import median

from tokenizers import Tokenizer

from loriner.config import MIB
from loriner.core import Request
from loriner.engine.grammars import Constraint, Grammars, Kind
from loriner.engine.runner import open_runner
from loriner.model.config import ModelConfig
from tests.canaries import CANARIES
from tests.engines import WatchedEngine, engine_config
from tests.fakes import make_request

BATCHES = (2, 8, 16)
MAX_TOKENS = 64
TURNS = 7
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "kind": {"enum": ["a", "b"]},
        "n": {"type": "integer"},
    },
    "required": ["name", "kind", "n"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": ITEM, "minItems": 500}


def requests(tokenizer: Tokenizer, size: int, grammar: str | None) -> list[Request]:
    """Every other one with `grammar`, if there is one."""
    made = []
    for i in range(size):
        own = grammar if i % 2 else None
        ids = tokenizer.encode(CANARIES[i % len(CANARIES)]).ids[:24]
        fields = {"grammar": own} if own else {"ignore_eos": True}
        made.append(make_request(ids, request_id=str(i), seed=i, max_tokens=MAX_TOKENS, **fields))
    return made


def seconds(engine: WatchedEngine, asked: list[Request]) -> float:
    for kept in (engine.outputs, engine.text, engine.ends):
        kept.clear()
    began = time.perf_counter()
    engine.run_all(asked)
    taken = time.perf_counter() - began
    assert all(len(tokens) == MAX_TOKENS for tokens in engine.outputs.values()), "a row ended"
    return taken


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-nf4")
    device = sys.argv[2] if len(sys.argv) > 2 else "cpu"
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    grammars = Grammars(folder, config.vocab_size, config.eos_token_ids)
    constraint = Constraint(Kind.JSON, json.dumps(ENDLESS), "schema")
    grammar = asyncio.run(grammars.compile(constraint))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = engine_config(
        folder, device=device, num_threads=0, kv_bytes=256 * MIB, prefix_cache=False
    )
    engine = WatchedEngine(settings, open_runner(settings), {}.__getitem__)
    for size in BATCHES:
        times: dict[str | None, list[float]] = {None: [], grammar: []}
        for _ in range(TURNS + 1):
            for kind, taken in times.items():
                taken.append(seconds(engine, requests(tokenizer, size, kind)))
        free, mixed = (size * MAX_TOKENS / median(taken[1:]) for taken in times.values())
        speeds = f"free {free:.0f} tokens/s, half constrained {mixed:.0f}, {mixed / free:.2f}"
        sys.stdout.write(f"batch {size}: {speeds}\n")
    engine.close()
    grammars.close()


if __name__ == "__main__":
    main()
