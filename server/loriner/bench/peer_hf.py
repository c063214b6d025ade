"""transformers, bitsandbytes and PEFT beside us: `generate` as their users call it.

A script (`python peer_hf.py JOB OUT`) that imports nothing of ours. `weights` in the job is `dense`
(the NF4 base dequantised to fp32) or `nf4`; PEFT's `adapter_names` picks an adapter for each row.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class Clock(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Notes the time after every token; never stops."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.ticks.append(time.monotonic())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load(job: dict[str, Any]) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    if job["weights"] == "dense":
        model = model.dequantize().float()
    if job["adapters"]:
        from peft import PeftModel

        first, *others = job["adapters"]
        model = PeftModel.from_pretrained(model, first, adapter_name="0")
        for index, folder in enumerate(others, 1):
            model.load_adapter(folder, adapter_name=str(index))
    model.generation_config.eos_token_id = None  # every row writes all its tokens
    return model.eval()


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    gaps = [longest - len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor([[0] * gap + p for gap, p in zip(gaps, prompts, strict=True)]),
        "attention_mask": torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps]),
    }


def measure(model: Any, prompts: list[list[int]], num_new: int, names: list[str]) -> dict[str, Any]:
    clock = Clock()
    inputs = left_padded(prompts)
    picks = {"adapter_names": names} if names else {}
    start = time.monotonic()
    out = model.generate(
        **inputs,
        **picks,
        do_sample=False,
        max_new_tokens=num_new,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return {
        "start": start,
        "prefill_s": clock.ticks[0] - start,
        "decode_s": clock.ticks[-1] - clock.ticks[0],
        "answer": out[0, -num_new:].tolist(),
    }


@torch.inference_mode()
def main(job: dict[str, Any]) -> list[dict[str, Any]]:
    torch.set_num_threads(job["threads"])
    model = load(job)
    names = [str(row) for row in range(len(job["adapters"]))]
    cases: list[dict[str, Any]] = [
        {"rows": rows, "adapters": len(names[:rows]), "runs": []} for rows in job["rows"]
    ]
    for rows in job["rows"]:
        measure(model, job["prompts"][:rows], 2, names[:rows])
    for _ in range(job["repeats"]):  # in turns, so that a busy moment hits no case alone
        for case in cases:
            prompts, picks = job["prompts"][: case["rows"]], names[: case["rows"]]
            case["runs"].append(measure(model, prompts, job["num_new"], picks))
    return cases


if __name__ == "__main__":
    job_file, out_file = map(Path, sys.argv[1:])
    out_file.write_text(json.dumps(main(json.loads(job_file.read_text()))))
