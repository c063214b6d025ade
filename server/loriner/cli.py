"""The command line: puts the commands together and turns errors into exit statuses.

0 is success, 1 a failure that is not the caller's, 2 a wrong flag or setting, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from loriner import __version__, bench
from loriner.commands import adapters, chat, demo, evaluate, keys, models, serve, train
from loriner.errors import ConfigError, LorinerError

_EPILOG = """a first session:
  loriner pull smollm2                          fetch a small base and quantise it to NF4
  loriner serve                                 serve it on http://127.0.0.1:8000
  loriner adapters add pirate PATH/TO/ADAPTER   publish a LoRA adapter while it serves
  loriner chat --adapter pirate "Who are you?"

or all at once: loriner demo
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loriner",
        description="One NF4 base model, thousands of LoRA adapters, one batch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"loriner {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve.add_command(subparsers)
    demo.add_command(subparsers)
    models.add_commands(subparsers)
    train.add_command(subparsers)
    evaluate.add_command(subparsers)
    adapters.add_command(subparsers)
    keys.add_command(subparsers)
    chat.add_command(subparsers)
    bench.add_commands(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    args = build_parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except LorinerError as error:
        print(f"loriner: error: {models.show_error(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return status
