"""`loriner adapters`: publish, list, inspect, pin, alias and remove on a running server."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Column, Table

from loriner.adapters.names import parse_name
from loriner.commands import publish
from loriner.commands.remote import Remote, RemoteError, add_flags, upload_parts
from loriner.errors import ConfigError

Action = Callable[[Remote, argparse.Namespace, Console], None]
PATH = "/admin/adapters"


def add_command(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "adapters",
        help="manage the adapters of a running server",
        description="Manage the adapters of a running server. A name is `name` or `tenant/name`.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, act: Action, help: str, *arguments: str) -> argparse.ArgumentParser:
        action: argparse.ArgumentParser = actions.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}."
        )
        for argument in arguments:
            action.add_argument(argument)
        add_flags(action)
        action.set_defaults(run=_run, act=act)
        return action

    add("list", _list, "list all adapters and where they are")
    add("show", _show, "show one adapter and its history", "name")
    upload = add("add", _add, "publish a PEFT folder or a .tar, .tar.gz or .zip of one", "name")
    upload.add_argument("path", type=Path)
    upload.add_argument(
        "--canaries",
        action="store_true",
        help="replay the folder's canaries, and publish only what is served as it was trained",
    )
    publish.add_tolerance(upload)
    alias = add("alias", _alias, "point a name at another's generation", "name", "target")
    remove = add("rm", _remove, "forget a name", "name")
    for action in (upload, alias, remove):
        action.add_argument(
            "--expect", metavar="DIGEST", help="only if the name stands for this generation now"
        )
    back = add("rollback", _rollback, "point a name at what it stood for before", "name")
    back.add_argument("--to", metavar="DIGEST", help="at this generation of its history")
    add("pin", _pin, "keep an adapter in memory", "name")
    add("unpin", _unpin, "let a pinned adapter go when room is needed", "name")
    add("evict", _evict, "take an adapter out of memory now", "name")


def _run(args: argparse.Namespace) -> int:
    with Remote(args.url, args.key) as remote:
        args.act(remote, args, Console(highlight=False, soft_wrap=True))
    return 0


def _list(remote: Remote, args: argparse.Namespace, console: Console) -> None:
    adapters = remote.call("GET", PATH)["adapters"]
    if not adapters:
        console.print("There are no adapters yet: loriner adapters add NAME PATH")
        return
    table = Table(
        *(Column(name, no_wrap=True) for name in ("name", "generation")),
        "ranks",
        Column("targets", overflow="fold"),
        *("size", "where", "pinned"),
    )
    for entry in adapters:
        where = entry["tier"] if entry["state"] == "ready" else entry["state"]
        table.add_row(
            entry["name"],
            entry["generation"][:12],
            ",".join(map(str, entry["ranks"])),
            ",".join(name.removesuffix("_proj") for name in entry["targets"]),
            decimal(entry["num_bytes"]),
            where,
            "yes" if entry["pinned"] else "",
        )
    console.print(table)


def _show(remote: Remote, args: argparse.Namespace, console: Console) -> None:
    record = remote.call("GET", _path(args.name))
    history = record.pop("history")
    for key, value in record.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        console.print(f"{key:>14}  {'-' if shown in (None, '') else shown}")
    for past in history[1:]:
        console.print(f"{'before':>14}  {past['generation']}  {_date(past['created_at'])}")


def _add(remote: Remote, args: argparse.Namespace, console: Console) -> None:
    if args.canaries:
        _add_checked(remote, args, console)
        return
    columns = (TextColumn("upload"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, console=console))
        task = progress.add_task("upload", total=_size(args.path))
        files = upload_parts(args.path, stack, lambda size: progress.advance(task, size))
        data = {"name": args.name}
        if args.expect is not None:
            data["expected_generation"] = args.expect
        report = remote.call("POST", PATH, data=data, files=files)
    console.print(
        f"{report['name']} is generation {report['generation']}: rank {report['ranks']}, "
        f"{report['modules_matched']} of {report['modules_total']} modules, "
        f"{decimal(report['num_bytes'])}{', known before' if report['existed'] else ''}."
    )


def _add_checked(remote: Remote, args: argparse.Namespace, console: Console) -> None:
    if args.expect is not None or not args.path.is_dir():
        raise ConfigError("--canaries takes a folder, and no --expect.")
    name, served = parse_name(args.name), publish.RemoteServed(remote)
    generation = publish.publish_checked(served, args.path, name, args.canary_tolerance)
    console.print(f"{name} is generation {generation}: served as it was trained.")


def _rollback(remote: Remote, args: argparse.Namespace, console: Console) -> None:
    """To the newest generation that is not the present one; done twice, it is undone."""
    record = remote.call("GET", _path(args.name))
    past = [entry["generation"] for entry in record["history"]]
    earlier = [digest for digest in past if digest != record["generation"]]
    if args.to:
        earlier = [digest for digest in past if digest.startswith(args.to)]
    if not earlier:
        what = f"no generation {args.to}" if args.to else "nothing before the present generation"
        raise RemoteError(f"{record['name']} has {what} in its history.")
    body = {"target": earlier[0], "expected_generation": record["generation"]}
    moved = remote.call("PUT", f"/admin/aliases/{quote(args.name)}", json=body)
    console.print(
        f"{moved['name']} is generation {moved['generation']} again; it was {record['generation']}."
    )


def _alias(remote: Remote, args: argparse.Namespace, console: Console) -> None:
    body = {"target": args.target, "expected_generation": args.expect}
    record = remote.call("PUT", f"/admin/aliases/{quote(args.name)}", json=body)
    console.print(f"{record['name']} is generation {record['generation']}.")


def _remove(remote: Remote, args: argparse.Namespace, console: Console) -> None:
    headers = {"if-match": f'"{args.expect}"'} if args.expect else {}
    record = remote.call("DELETE", _path(args.name), headers=headers)
    console.print(f"{record['name']} is forgotten; it was generation {record['generation']}.")


def _pin(remote: Remote, args: argparse.Namespace, console: Console) -> None:
    record = remote.call("POST", _path(args.name) + "/pin")
    console.print(f"{record['name']} stays in memory.")


def _unpin(remote: Remote, args: argparse.Namespace, console: Console) -> None:
    record = remote.call("POST", _path(args.name) + "/unpin")
    console.print(f"{record['name']} may leave memory.")


def _evict(remote: Remote, args: argparse.Namespace, console: Console) -> None:
    record = remote.call("POST", _path(args.name) + "/evict")
    console.print(f"{record['name']} leaves memory unless it is running.")


def _path(name: str) -> str:
    return f"{PATH}/{quote(name)}"


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*") if file.is_file())


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
