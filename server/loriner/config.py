"""Settings: frozen dataclasses, and the one function that fills them from flags, `LORINER_*` and
TOML.

Every field carries its help text, so command line, environment and file can never drift apart.
Order of precedence: flag, environment variable, TOML key, default. Unknown TOML keys are an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loriner.errors import ConfigError

T = TypeVar("T")

MIB = 1 << 20
GIB = 1 << 30
KEY_ENV = ("LORINER_ADMIN_KEY", "LORINER_API_KEY")  # where commands find a server's key


def setting(
    default: Any,
    help: str,
    *,
    instead_of: str = "",
    env: tuple[str, ...] | None = None,
    **limits: float,
) -> Any:
    """A dataclass field with help text and optional `low` / `high` limits (inclusive).

    `instead_of` is the field that it excludes: of two from different sources the stronger stays.
    `env` are its environment variables, the first that is not empty wins; None: LORINER_NAME.
    """
    told = {"help": help, "instead_of": instead_of, "env": env}
    return dataclasses.field(default=default, metadata={**told, **limits})


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine process needs. Sizes are bytes, times are seconds, lengths are tokens."""

    model: Path = setting(Path("models/smollm2-nf4"), "folder of the NF4 base model")
    device: str = setting("auto", "auto, cpu or cuda")
    max_model_len: int = setting(0, "longest prompt + answer, tokens (0: the model's own)", low=0)
    max_sequences: int = setting(32, "most sequences that run in one step", low=1, high=4096)
    max_step_tokens: int = setting(
        0,
        "token budget of one step (0: 32 on a CPU, 16 while several tenants ask; 512 on a GPU,"
        " max_sequences if more)",
        low=0,
    )
    block_size: int = setting(16, "tokens in one KV block", low=1, high=256)
    kv_bytes: int = setting(
        0, "memory for the KV cache (0: 512 MiB on a CPU, from what is free on a GPU)", low=0
    )
    max_seats: int = setting(32, "most adapters in one step", low=1)
    pool_bytes: int = setting(
        0,
        "memory for adapters that can run now (0: 512 MiB on a CPU, from what is free on a GPU)",
        low=0,
    )
    gpu_memory_fraction: float = setting(
        0.9, "of the GPU's memory, all of ours together: base, adapters, KV cache", low=0.01, high=1
    )
    pool_fraction: float = setting(
        0.3, "of what the base leaves on the GPU, for adapters; the rest is KV cache", low=0, high=1
    )
    bf16_shadow: bool = setting(
        False,
        "on a GPU, also keep the base's linears in bf16, four times their NF4 bytes, for steps of"
        " more than 256 rows: long prompts then wait for no dequantising",
    )
    host_bytes: int = setting(1 * GIB, "memory for adapters kept warm on the host", low=1)
    prefix_cache: bool = setting(True, "reuse KV blocks of equal prefixes")
    max_waiting: int = setting(1024, "most sequences that may wait; more are refused", low=0)
    num_threads: int = setting(0, "CPU threads (0: all cores)", low=0)

    def __post_init__(self) -> None:
        check_limits(self)
        if self.max_step_tokens and self.max_step_tokens < self.max_sequences:
            raise ConfigError("max_step_tokens must be at least max_sequences: each takes one.")
        check_choice(self, "device", ("auto", "cpu", "cuda"))

    def step_tokens(self, usual: int) -> int:
        """Token budget of one step on a device where this one is `usual`."""
        return self.max_step_tokens or max(usual, self.max_sequences)

    def shared_step_tokens(self, usual: int) -> int:
        """The same while several tenants ask: not all that run need a row in each step."""
        return self.max_step_tokens or usual


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the doors need."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on (0: any free one)", low=0, high=65535)
    grpc_port: int | None = setting(
        None, "port of the gRPC door (0: any free one; unset: none)", low=0, high=65535
    )
    grpc_cert: Path | None = setting(None, "PEM certificate chain of the gRPC door: turns TLS on")
    grpc_key: Path | None = setting(None, "PEM private key of grpc_cert")
    grpc_client_ca: Path | None = setting(
        None, "PEM authorities; gRPC clients must then show a certificate of theirs (mTLS)"
    )
    store: Path = setting(Path("adapters"), "folder of the adapter store")
    served_name: str = setting("", "name of the base in /v1/models (default: the folder's name)")
    api_key: str = setting("", "key that clients must send; empty only on a loopback address")
    admin_key: str = setting("", "key for /admin (default: api_key)")
    adapter_root: Path | None = setting(None, "folder inside which uploads may name a path")
    max_upload_bytes: int = setting(2 * GIB, "largest upload", low=1)
    max_body_bytes: int = setting(8 * MIB, "largest JSON body", low=1)
    tenant_share: float = setting(
        0.5,
        "of the queue that others leave, the most that one tenant without a quota may fill",
        low=0,
        high=1,
    )
    shutdown_s: float = setting(30.0, "grace for running requests at shutdown", low=0)
    watchdog_s: float = setting(
        300.0,
        "an engine that does not answer for so long, as when its GPU hangs, is ended and started"
        " again: more than any step takes (0: never; not while it loads)",
        low=0,
    )
    tool_format: str = setting(
        "auto",
        "how the base writes tool calls: auto (by its chat template), hermes, llama3 or mistral",
    )
    training: Path | None = setting(None, "folder of files and jobs of training over HTTP")
    training_device: str = setting("cpu", "where such jobs train: auto, cpu or cuda")
    training_threads: int = setting(0, "CPU threads of such a job (0: half of the cores)", low=0)
    training_memory_fraction: float = setting(
        0.1, "most of the GPU's memory that one such job takes", low=0.01, high=1
    )
    training_duty: float = setting(
        0.5, "share of the time that such a job computes on a GPU", low=0.01, high=1
    )
    max_training_jobs: int = setting(1, "such jobs at a time; more wait", low=1, high=64)

    def __post_init__(self) -> None:
        if (self.grpc_cert is None) != (self.grpc_key is None):
            raise ConfigError("grpc_cert and grpc_key go together.")
        if self.grpc_client_ca is not None and self.grpc_cert is None:
            raise ConfigError("grpc_client_ca needs grpc_cert and grpc_key.")
        check_limits(self)
        check_choice(self, "training_device", ("auto", "cpu", "cuda"))
        check_choice(self, "tool_format", ("auto", "hermes", "llama3", "mistral"))


def add_flags(parser: argparse.ArgumentParser, *classes: type) -> None:
    """Add one `--flag` for each field of `classes` to `parser`; absent flags parse to None."""
    for cls in classes:
        group = parser.add_argument_group(cls.__name__.removesuffix("Config").lower())
        for field in dataclasses.fields(cls):
            names = " or ".join(env_names(field))
            env = f", env: {names}" if names else ""
            text = f"{field.metadata['help']} (default: {field.default}{env})"
            flag = "--" + field.name.replace("_", "-")
            kind = _type_of(cls, field)
            if kind is bool:
                group.add_argument(
                    flag, action=argparse.BooleanOptionalAction, default=None, help=text
                )
            else:
                group.add_argument(flag, default=None, metavar=kind.__name__.upper(), help=text)


def load(
    cls: type[T],
    flags: Mapping[str, object] | None = None,
    env: Mapping[str, str] | None = None,
    toml: Path | None = None,
    table: Mapping[str, object] | None = None,
) -> T:
    """Build `cls` from flags, then environment, then TOML or a `table` that the caller has read
    and checked for unknown keys. Raises ConfigError naming the setting."""
    env = os.environ if env is None else env
    table = _read_toml(toml, cls) if toml else table or {}
    values: dict[str, Any] = {}
    ranks: dict[str, int] = {}  # of a value that says something: 0 is a flag's
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = field.name
        sources = (flags or {}).get(name), _in_environment(field, env), table.get(name)
        for rank, raw in enumerate(sources):
            if raw is not None:
                values[name] = _parse(name, _type_of(cls, field), raw)
                ranks |= {name: rank} if values[name] != field.default else {}
                break
    for name in _overruled(cls, ranks):
        del values[name]
    return cls(**values)


def _overruled(cls: type, ranks: Mapping[str, int]) -> Iterator[str]:
    """The settings whose excluded partner comes from a stronger source."""
    for field in dataclasses.fields(cls):
        pair = [name for name in (field.name, field.metadata["instead_of"]) if name in ranks]
        if len(pair) == 2 and ranks[pair[0]] != ranks[pair[1]]:
            yield max(pair, key=lambda name: ranks[name])


def env_names(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    names: tuple[str, ...] | None = field.metadata["env"]
    return ("LORINER_" + field.name.upper(),) if names is None else names


def _in_environment(field: dataclasses.Field[Any], env: Mapping[str, str]) -> str | None:
    values = [env[name] for name in env_names(field) if name in env]
    return next(filter(None, values), values[0] if values else None)


_SUFFIXES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def _parse(name: str, kind: type, raw: object) -> Any:
    if isinstance(raw, kind) and not (kind is int and isinstance(raw, bool)):
        return raw
    text = str(raw).strip()
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        if kind is int and name.endswith("_bytes"):
            return _parse_bytes(text)
        return kind(text)
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"{name}: {raw!r} is not a valid {kind.__name__}.") from None


def _parse_bytes(text: str) -> int:
    number = text.lower().removesuffix("b").removesuffix("i")
    scale = _SUFFIXES.get(number[-1:], 1)
    return int(float(number.rstrip("kmg")) * scale)


def _read_toml(path: Path, cls: type) -> dict[str, Any]:
    """Read the table of `cls` ([engine], [server]) from `path`; unknown tables and keys are
    refused."""
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    section = cls.__name__.removesuffix("Config").lower()
    unknown = set(document) - {"engine", "server"}
    table = document.get(section, {})
    unknown |= {
        f"{section}.{key}" for key in set(table) - {f.name for f in dataclasses.fields(cls)}
    }
    if unknown:
        raise ConfigError(f"{path}: unknown settings {', '.join(sorted(unknown))}.")
    return typing.cast(dict[str, Any], table)


def _type_of(cls: type, field: dataclasses.Field[Any]) -> type:
    hint = typing.get_type_hints(cls)[field.name]
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return typing.cast(type, hint)


def check_limits(config: Any) -> None:
    """Raises ConfigError when a field is outside its `low` and `high`."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        low, high = field.metadata.get("low"), field.metadata.get("high")
        if value is None:
            continue
        if low is not None and not value >= low:
            raise ConfigError(f"{field.name} must be at least {low}, got {value}.")
        if high is not None and value > high:
            raise ConfigError(f"{field.name} must be at most {high}, got {value}.")


def check_exclusive(config: Any) -> None:
    """Raises ConfigError when a field and the one that it excludes are both set."""
    for field in dataclasses.fields(config):
        other = field.metadata["instead_of"]
        if other and getattr(config, field.name) and getattr(config, other):
            raise ConfigError(f"{other} and {field.name} exclude each other.")


def check_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError when the field `name` is none of `choices`."""
    if getattr(config, name) not in choices:
        raise ConfigError(
            f"{name} must be one of {', '.join(choices)}, got {getattr(config, name)}."
        )
