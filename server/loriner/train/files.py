"""Settings files: flat TOML or YAML with the names of the flags, Axolotl's YAML, and jobs files.

A jobs file has settings for all jobs at its top and a `[[jobs]]` table for each. Invariant: a key
that no setting honours is an error that names it, unless the caller chose to ignore such keys.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loriner.config import load
from loriner.errors import ConfigError
from loriner.train.axolotl import is_axolotl, translate
from loriner.train.settings import JobConfig, PromoteConfig, PublishConfig, RunConfig


def _names(*classes: type) -> frozenset[str]:
    return frozenset(field.name for cls in classes for field in dataclasses.fields(cls))


RUN_KEYS = _names(RunConfig, PublishConfig)
JOB_KEYS = _names(JobConfig, PromoteConfig)
SERVED_KEYS = JOB_KEYS | _names(RunConfig)  # such a job is published to its server
MAX_JOBS = 256


@dataclass(frozen=True, slots=True)
class Settings:
    """A whole run; `ignored` are the keys that were left aside on demand."""

    run: RunConfig
    jobs: tuple[JobConfig, ...]
    ignored: tuple[str, ...] = ()
    publish: PublishConfig = PublishConfig()
    promote: tuple[PromoteConfig, ...] = ()  # one a job


def load_settings(
    flags: Mapping[str, object],
    config: Path | None = None,
    jobs: Path | None = None,
    *,
    ignore_unknown: bool = False,
) -> Settings:
    """Flags win over LORINER_*, those over the files. Raises ConfigError naming the setting."""
    if config is not None and jobs is not None:
        raise ConfigError("--config and --jobs exclude each other: a jobs file holds both.")
    path = jobs or config
    table = read_table(path) if path else {}
    tables = _job_tables(table, jobs) if jobs else [{}]
    table, ignored = translate(table) if is_axolotl(table) else (table, [])
    ignored += _unknown(table, tables)
    if ignored and not ignore_unknown:
        raise ConfigError(
            f"{path}: cannot honour {', '.join(dict.fromkeys(ignored))}; remove them, or give "
            "--ignore-unknown to train without."
        )
    return _made(flags, table, tables, tuple(dict.fromkeys(ignored)))


def check_served(table: Mapping[str, object]) -> None:
    """What `loriner train` says to a file with this table when a server runs it as one job, with
    no LORINER_* and published to itself. Raises ConfigError naming the setting."""
    _made({"publish": "http://localhost"}, table, [{}], env={})


def _made(
    flags: Mapping[str, object],
    table: Mapping[str, Any],
    tables: Sequence[Mapping[str, Any]],
    ignored: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
) -> Settings:
    run = load(RunConfig, flags, env, table=_flat(table))
    parts = [_flat(_over(table, part)) for part in tables]
    made = tuple(load(JobConfig, flags, env, table=part) for part in parts)
    _check_distinct(made)
    publish = load(PublishConfig, flags, env, table=_flat(table))
    promote = tuple(load(PromoteConfig, flags, env, table=part) for part in parts)
    _check_published(publish, made, promote)
    return Settings(run, made, ignored, publish, promote)


def _unknown(table: dict[str, Any], tables: list[dict[str, Any]]) -> list[str]:
    """Keys that no setting honours, and keys of the run that stand in a job."""
    everywhere = [key for part in (table, *tables) for key in part]
    misplaced = [f"jobs.{key}" for part in tables for key in part if key in RUN_KEYS]
    return [key for key in everywhere if key not in RUN_KEYS | JOB_KEYS] + misplaced


def read_table(path: Path) -> dict[str, Any]:
    """The table in a .toml, .yaml or .yml file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    table = _parse_yaml(path, text) if path.suffix in (".yaml", ".yml") else _parse_toml(path, text)
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise ConfigError(f"{path} must be a table of settings.")
    return table


def _parse_toml(path: Path, text: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error


def _parse_yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from error


def _job_tables(table: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    tables = table.pop("jobs", None)
    if not isinstance(tables, list) or not all(isinstance(part, dict) for part in tables):
        raise ConfigError(f"{path} needs a [[jobs]] table for each adapter.")
    if not 1 <= len(tables) <= MAX_JOBS:
        raise ConfigError(f"{path}: jobs must be 1 to {MAX_JOBS}, got {len(tables)}.")
    return tables


def _over(top: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """A job's table with the top of its file, without what the job's own keys exclude."""
    pairs = [(f.name, f.metadata["instead_of"]) for f in dataclasses.fields(JobConfig)]
    excluded = {b for a, b in pairs if part.get(a)} | {a for a, b in pairs if part.get(b)}
    return {key: value for key, value in top.items() if key not in excluded} | dict(part)


def _flat(table: Mapping[str, Any]) -> dict[str, object]:
    """Lists as the flags write them; only what a setting could be."""
    return {
        key: ",".join(map(str, value)) if isinstance(value, list) else value
        for key, value in table.items()
    }


def _check_distinct(jobs: tuple[JobConfig, ...]) -> None:
    for what, values in (
        ("name", [job.name for job in jobs]),
        ("out", [str(job.folder) for job in jobs]),
    ):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ConfigError(f"two jobs have the {what} {twice[0]}.")


def _check_published(
    publish: PublishConfig, jobs: tuple[JobConfig, ...], promote: tuple[PromoteConfig, ...]
) -> None:
    """What is known before a run could only fail once it has been trained."""
    aliases = [part.alias(job.name) for job, part in zip(jobs, promote, strict=True)]
    wanted = [alias for alias in aliases if alias is not None]
    if wanted and not publish.is_wanted:
        raise ConfigError("promote needs publish or store.")
    if twice := [alias for alias in wanted if wanted.count(alias) > 1]:
        raise ConfigError(f"two jobs would promote {twice[0]}: an alias is of one adapter.")
    for job, part in zip(jobs, promote, strict=True):
        if part.promote and not job.has_eval:
            raise ConfigError(
                f"promote needs eval_data or eval_split for {job.name}: an alias moves only when "
                "the gate passes on held-out data."
            )
        if publish.is_wanted and not job.canaries:
            raise ConfigError(
                f"publish and store need canaries of at least 1 for {job.name}: they show that it "
                "is served as it was trained."
            )
