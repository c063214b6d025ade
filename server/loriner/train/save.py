"""The finished adapter's folder: PEFT's two files, the base's digest, canaries, gate, card, plot.

Invariant: the folder appears whole, by one rename, and opens in PEFT as it opens in the server.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loriner.train import canaries, gate
from loriner.train.base import Base
from loriner.train.card import write_card
from loriner.train.gate import Gate, judge
from loriner.train.job import Job
from loriner.train.masks import Masker
from loriner.train.peft_folder import write_peft_folder
from loriner.train.plot import write_plot
from loriner.train.recording import record
from loriner.train.samples import Sample, take_samples

ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class Finished:
    """One adapter that is ready to be published."""

    folder: Path
    gate: Gate
    samples: Sequence[Sample]


def finish(job: Job, base: Base, masker: Masker, tokenizer: Any, command: str) -> Finished:
    """Go back to the best weights, judge them, and write OUT/adapter anew."""
    from_step = job.keep_best()
    verdict = judge(job, base, masker, tokenizer)
    samples = take_samples(job, base, masker, tokenizer)
    prompts = (job.held or job.data).prompts
    recorded = record(base, job.lora, masker, tokenizer, prompts, job.settings.canaries)
    final = job.settings.folder / ADAPTER
    part = final.with_name(f".{ADAPTER}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    write_peft_folder(part, job.lora, job.settings, base.digest, base.path.name)
    canaries.write(part, recorded)
    gate.write(part, verdict)
    write_plot(part, job)
    write_card(part, job, base, verdict, samples, from_step, command)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    return Finished(final, verdict, samples)
