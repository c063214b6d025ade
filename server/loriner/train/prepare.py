"""Settings -> data and jobs. Refuses, before anything is loaded, what could not be trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from loriner.errors import CheckpointError, ConfigError, DataError
from loriner.model.config import ModelConfig
from loriner.model.weights import Checkpoint
from loriner.train.base import Base, load_tokenizer
from loriner.train.data import DataSet, load_data, parse_columns
from loriner.train.files import Settings
from loriner.train.job import Job
from loriner.train.masks import Masker
from loriner.train.settings import JobConfig

MAX_LENGTH = 1024  # where max_length is 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """The rows of one job."""

    settings: JobConfig
    data: DataSet
    held: DataSet | None

    def summary(self) -> str:
        return self.data.summary() + (f"\n{self.held.summary()}" if self.held else "")


@dataclass(frozen=True, slots=True)
class Preparation:
    """All that is known before the base is loaded."""

    settings: Settings
    config: ModelConfig
    tokenizer: Any
    masker: Masker
    jobs: tuple[Prepared, ...]

    def start(self, base: Base) -> list[Job]:
        """Jobs at step 0."""
        return [Job(part.settings, base, part.data, part.held) for part in self.jobs]


def prepare(settings: Settings) -> Preparation:
    """Raises CheckpointError, ConfigError, DataError."""
    _check_paths(settings)
    config = Checkpoint.open(settings.run.base).config
    tokenizer = load_tokenizer(settings.run.base)
    masker = Masker(tokenizer, config.eos_token_ids)
    if not config.eos_token_ids:
        raise ConfigError(f"base: {settings.run.base} names no end-of-sequence token.")
    jobs = tuple(_prepare_job(job, masker, config) for job in settings.jobs)
    return Preparation(settings, config, tokenizer, masker, jobs)


def _check_paths(settings: Settings) -> None:
    """Files written for other trainers name bases and data sets of a hub."""
    base = settings.run.base
    if not base.is_dir():
        raise CheckpointError(
            f"{base}: No such folder. Names of a hub are not looked up: --base gives a folder of "
            "your own with an NF4 base."
        )
    for job in settings.jobs:
        for flag, path in (("--data", job.data_path), ("--eval-data", job.eval_data)):
            if path is not None and not path.is_file():
                raise DataError(
                    f"{path}: No such file. Names of a hub are not looked up: {flag} gives a file "
                    "of your own."
                )


def _prepare_job(job: JobConfig, masker: Masker, config: ModelConfig) -> Prepared:
    if job.max_length > config.max_context:
        raise ConfigError(
            f"max_length must be at most {config.max_context}, the base's context, "
            f"got {job.max_length}."
        )
    if not job.max_length:
        job = dataclasses.replace(job, max_length=min(MAX_LENGTH, config.max_context))
    columns = parse_columns(job.columns)

    def load(path: Any) -> DataSet:
        return load_data(
            path,
            masker,
            max_length=job.max_length,
            columns=columns,
            max_bad_share=job.max_bad_share,
        )

    data = load(job.data_path)
    if job.eval_data is not None:
        return Prepared(job, data, load(job.eval_data).limited(job.eval_rows))
    if job.eval_split:
        train, held = data.split(job.eval_split, job.seed)
        return Prepared(job, train, held.limited(job.eval_rows))
    return Prepared(job, data, None)
