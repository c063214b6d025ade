"""Change a store in children that are killed before their n-th step to the disk, for every n.

Started as a process of its own (it forks, so it must have one thread): `python kill_points.py WORK
FOLDER FOLDER power|kill`. Prints one JSON line for each kill point: what the child saw
acknowledged, and what a store opened afterwards holds. With `power` the child first undoes what the
disk need not have kept: bytes and entries without fsync, renames without fsync.
"""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import sqlite3
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loriner.adapters import intake
from loriner.adapters.store import Store
from loriner.errors import AdapterNotFoundError
from tests.adapters.samples import BASE, TINY

MAX_POINTS = 400


class Disk:
    """Counts steps, kills at one of them, and knows what was made durable before."""

    def __init__(self, root: Path, kill_at: int, loses_power: bool) -> None:
        self.root = root
        self.kill_at = kill_at
        self.loses_power = loses_power
        self.steps = 0
        self.durable = {path.stat().st_ino for path in root.rglob("*")}
        self.renames: list[tuple[str, str]] = []

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.kill_at:
            if self.loses_power:
                self.lose_power()
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.step()
            return call(*args, **options)

        return counted

    def fsync(self, fd: int) -> None:
        self.step()  # and no more: a kill loses nothing that the kernel has
        found = os.fstat(fd)
        self.durable.add(found.st_ino)
        if stat.S_ISDIR(found.st_mode):
            folder = os.readlink(f"/proc/self/fd/{fd}")
            self.renames = [r for r in self.renames if os.path.dirname(r[1]) != folder]

    def rename(self, source: Any, target: Any) -> None:
        self.step()
        REAL_RENAME(source, target)
        self.renames.append((os.fspath(source), os.fspath(target)))

    def lose_power(self) -> None:
        """The worst state a disk may be in: what nobody synced is halved, gone or not renamed."""
        for source, target in reversed(self.renames):
            REAL_RENAME(target, source)
        for folder in ("generations", "incoming"):
            for path in (self.root / folder).rglob("*"):
                if path.is_file() and path.stat().st_ino not in self.durable:
                    os.truncate(path, path.stat().st_size // 2)
                elif path.is_file() and path.parent.stat().st_ino not in self.durable:
                    path.unlink()


REAL_RENAME, REAL_CONNECT = os.rename, sqlite3.connect


def install(disk: Disk) -> None:
    """Put `disk` before every step that this process takes to the real one."""
    os.fsync = disk.fsync  # type: ignore[assignment]
    os.rename = disk.rename  # type: ignore[assignment]
    for name in ("open", "mkdir", "unlink", "rmdir", "replace"):
        setattr(os, name, disk.wrap(getattr(os, name)))
    copy = intake._copy

    def torn_copy(source: Any, write: Callable[[bytes], object], *rest: Any) -> int:
        def half_then_half(data: bytes) -> None:
            disk.step()
            write(data[: len(data) // 2])
            disk.step()
            write(data[len(data) // 2 :])

        return copy(source, half_then_half, *rest)

    intake._copy = torn_copy  # type: ignore[assignment]

    use_connections(disk.step)


def use_connections(step: Callable[[], None]) -> None:
    """Make SQLite step too. Its own fsyncs are taken as given, and left out for speed."""

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            step()
            found = super().execute(sql.replace("synchronous = FULL", "synchronous = OFF"), *values)
            if sql == "COMMIT":
                step()
            return found

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        return REAL_CONNECT(*args, factory=Connection, **options)

    sqlite3.connect = connect  # type: ignore[assignment]


def changes(store: Store, folders: list[Path], tell: Callable[[str], object]) -> None:
    """A life: publish anew, publish over, alias, delete; each is told once it is acknowledged."""
    store.publish(folders[1], "b")
    tell("b published")
    store.publish(folders[1], "a")
    tell("a moved")
    store.set_alias("c", "old")
    tell("c aliased")
    store.delete("old")
    tell("old deleted")
    store.delete("c")
    tell("c deleted")


def run_child(root: Path, folders: list[Path], kill_at: int, power: bool) -> tuple[int, list[str]]:
    """Returns the child's wait status and what it told before it died."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        install(Disk(root, kill_at, power))
        with Store(root, TINY, BASE) as store:
            changes(store, folders, lambda text: os.write(writer, text.encode() + b"\n"))
        os._exit(0)
    os.close(writer)
    with builtins.open(reader) as told:
        lines = told.read().splitlines()
    return os.waitpid(pid, 0)[1], lines


def inspect(root: Path) -> dict[str, Any]:
    """What a store finds on this root: names that load, and what is left over."""
    with Store(root, TINY, BASE) as store:
        names: dict[str, str | None] = {}
        for name in ("a", "b", "c", "old"):
            try:
                names[name] = store.load(store.resolve(name).generation).generation
            except AdapterNotFoundError:
                names[name] = None
        kept = {r.generation for n in names if names[n] for r in store.history(n)}
        for generation in kept:
            store.load(generation)
        folders = {folder.name for folder in (root / "generations").iterdir()}
        return {
            "names": names,
            "strays": sorted(folders ^ kept),
            "uploads": sum(path.is_file() for path in (root / "incoming").rglob("*")),
            "quarantined": len(list((root / "quarantine").iterdir())),
        }


def main(work: Path, folders: list[Path], power: bool) -> None:
    os.fsync = lambda fd: None
    use_connections(lambda: None)
    start = work / "start"
    with Store(start, TINY, BASE) as store:
        first = store.publish(folders[0], "a").generation
        store.publish(folders[2], "old")
    for kill_at in range(1, MAX_POINTS):
        root = work / "store"
        shutil.copytree(start, root)
        status, told = run_child(root, folders, kill_at, power)
        found = inspect(root) | {"told": told, "killed": os.WIFSIGNALED(status), "first": first}
        sys.stdout.write(json.dumps(found) + "\n")
        shutil.rmtree(root)
        if status == 0:
            return
    raise SystemExit("the changes never went through")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:5]], sys.argv[5] == "power")
