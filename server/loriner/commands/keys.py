"""`loriner keys`: make, list and revoke API keys in a store's folder, with or without a server.

A running server sees each change at its next request.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loriner.api.tenants import SCOPES, Tenants

Action = Callable[[Tenants, argparse.Namespace, Console], None]


def add_command(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "keys",
        help="manage tenants' API keys",
        description="Manage the API keys of a store's tenants. A server that runs on the same "
        "store sees each change at once.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, act: Action, help: str) -> argparse.ArgumentParser:
        action: argparse.ArgumentParser = actions.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}."
        )
        action.add_argument(
            "--store",
            type=Path,
            default=Path(os.environ.get("LORINER_STORE", "adapters")),
            help="folder of the adapter store (default: adapters, env: LORINER_STORE)",
        )
        action.set_defaults(run=_run, act=act)
        return action

    create = add("create", _create, "make a key and print it, this once")
    create.add_argument("tenant")
    create.add_argument(
        "--scopes",
        default="infer,read",
        help=f"comma-separated, of {', '.join(SCOPES)} (default: infer,read)",
    )
    create.add_argument("--note", default="", help="what it is for")
    add("list", _list, "list all keys, without their secrets")
    add("revoke", _revoke, "refuse a key from now on").add_argument("id")


def _run(args: argparse.Namespace) -> int:
    args.act(Tenants(args.store), args, Console(highlight=False, soft_wrap=True))
    return 0


def _create(tenants: Tenants, args: argparse.Namespace, console: Console) -> None:
    scopes = [scope.strip() for scope in args.scopes.split(",") if scope.strip()]
    key, token = tenants.create_key(args.tenant, scopes, args.note)
    console.print(f"Key {key.id} of {key.tenant} ({', '.join(key.scopes)}), shown this once:")
    console.print(token, markup=False)


def _list(tenants: Tenants, args: argparse.Namespace, console: Console) -> None:
    keys = tenants.all_keys()
    if not keys:
        console.print("There are no keys yet: loriner keys create TENANT")
        return
    table = Table("id", "tenant", "scopes", "made", "revoked", "note")
    for key in keys:
        revoked = "" if key.revoked_at is None else _date(key.revoked_at)
        scopes = ", ".join(key.scopes)
        table.add_row(key.id, key.tenant, scopes, _date(key.created_at), revoked, key.note)
    console.print(table)


def _revoke(tenants: Tenants, args: argparse.Namespace, console: Console) -> None:
    key = tenants.revoke_key(args.id)
    console.print(f"Key {key.id} of {key.tenant} is refused from now on.")


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
