"""`loriner serve`: settings in, a server until a signal."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from loriner.config import EngineConfig, ServerConfig, add_flags, load
from loriner.errors import ConfigError

if TYPE_CHECKING:
    from loriner.api.server import Server

Settings = tuple[EngineConfig, ServerConfig]

_EXAMPLES = """examples:
  loriner serve --model models/smollm2-nf4
  loriner serve --host 0.0.0.0 --api-key "$KEY" --store /var/lib/loriner
  loriner serve --config loriner.toml        # [engine] and [server] tables, same names as the flags
"""


def add_command(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a base and its adapters over HTTP",
        description="Serve one NF4 base and any number of LoRA adapters through the OpenAI API.\n"
        "A flag wins over its environment variable, that over the TOML file, that over the "
        "default.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser)
    parser.set_defaults(run=run)


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    add_flags(parser, EngineConfig, ServerConfig)


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises ConfigError naming the setting that is wrong."""
    flags = vars(args)
    return load(EngineConfig, flags, toml=args.config), load(ServerConfig, flags, toml=args.config)


def run(args: argparse.Namespace) -> int:
    serve(settings_of(args), Console(highlight=False, soft_wrap=True))
    return 0


def serve(
    settings: Settings,
    console: Console,
    on_ready: Callable[[Server], Awaitable[None]] | None = None,
) -> None:
    """Serve until a signal; `on_ready` runs beside the server once the engine is ready."""
    engine, server = settings
    if not (engine.model / "config.json").is_file():
        raise ConfigError(
            f"there is no base model in {engine.model}: run `loriner pull smollm2`, or name a "
            "folder made by `loriner quantize` with --model."
        )
    log_to_stderr(logging.INFO if on_ready is None else logging.WARNING)
    from loriner.api.access import check_binding
    from loriner.api.server import Server
    from loriner.api.shared import JobSettings
    from loriner.api.tenants import Tenants
    from loriner.engine.service import Service  # brings torch, so only now
    from loriner.train.files import SERVED_KEYS, check_served

    check_binding(server)
    service = Service(engine, server)
    console.print(f"Base {service.model_name}, digest {service.base_digest[:12]}.")
    if not server.api_key and not Tenants(server.store).has_keys:
        console.print(
            "[bold]No API key is set: local mode.[/] Only this machine can reach the server, and "
            "everyone on it may use and administer it."
        )
    jobs = JobSettings(SERVED_KEYS, check_served)
    Server(service, server, console.print, on_ready, jobs).run()


def log_to_stderr(level: int) -> None:
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("loriner").setLevel(level)
