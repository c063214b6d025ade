"""llama.cpp beside us: decodes `rows` prompts greedily, one token of each sequence per step.

A script that runs in the peer's own environment (`python peer_llama.py JOB OUT`), so it imports
nothing of ours. It reads the job as peers.py wrote it and writes a list of timed cases.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as lc  # type: ignore[import-not-found, unused-ignore]
import numpy as np


class Decoder:
    """One context of `rows` sequences; `step` feeds tokens and returns each sequence's next one."""

    def __init__(self, gguf: str, threads: int, rows: int, context: int) -> None:
        lc.llama_backend_init()
        self.model = lc.llama_model_load_from_file(gguf.encode(), lc.llama_model_default_params())
        params = lc.llama_context_default_params()
        params.n_ctx = rows * context
        params.n_batch = params.n_ctx
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = threads
        self.context = lc.llama_init_from_model(self.model, params)
        self.num_vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self.model))
        self.batch = lc.llama_batch_init(params.n_ctx, 0, 1)
        self.lengths = [0] * rows

    def clear(self) -> None:
        lc.llama_memory_clear(lc.llama_get_memory(self.context), True)
        self.lengths = [0] * len(self.lengths)

    def step(self, rows: list[list[int]]) -> list[int]:
        batch, count, last = self.batch, 0, []
        for row, tokens in enumerate(rows):
            for token in tokens:
                batch.token[count] = token
                batch.pos[count] = self.lengths[row]
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = row
                batch.logits[count] = 0
                self.lengths[row] += 1
                count += 1
            batch.logits[count - 1] = 1
            last.append(count - 1)
        batch.n_tokens = count
        if lc.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [self._best(index) for index in last]

    def _best(self, index: int) -> int:
        logits = lc.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self.num_vocab,)).argmax())


def measure(decoder: Decoder, prompts: list[list[int]], num_new: int) -> dict[str, Any]:
    decoder.clear()
    start = time.monotonic()
    tokens = decoder.step(prompts)
    prefilled = time.monotonic()
    answer = [tokens[0]]
    for _ in range(num_new - 1):
        tokens = decoder.step([[token] for token in tokens])
        answer.append(tokens[0])
    end = time.monotonic()
    return {
        "start": start,
        "prefill_s": prefilled - start,
        "decode_s": end - prefilled,
        "answer": answer,
    }


def main(job: dict[str, Any]) -> list[dict[str, Any]]:
    context = max(map(len, job["prompts"])) + job["num_new"]
    decoders = [Decoder(job["gguf"], job["threads"], rows, context) for rows in job["rows"]]
    cases: list[dict[str, Any]] = [
        {"rows": rows, "adapters": 0, "runs": []} for rows in job["rows"]
    ]
    for decoder, case in zip(decoders, cases, strict=True):
        measure(decoder, job["prompts"][: case["rows"]], 4)
    for _ in range(job["repeats"]):  # in turns, so that a busy moment hits no case alone
        for decoder, case in zip(decoders, cases, strict=True):
            prompts = job["prompts"][: case["rows"]]
            case["runs"].append(measure(decoder, prompts, job["num_new"]))
    return cases


if __name__ == "__main__":
    job_file, out_file = map(Path, sys.argv[1:])
    out_file.write_text(json.dumps(main(json.loads(job_file.read_text()))))
