"""The store's catalogue: names, their histories and the generations, in one SQLite file (WAL).

Knows rows, not files. Readers never wait for a writer. Invariant: a transaction that was committed
survives power loss (synchronous=FULL), and writers come one at a time (the store's exclusive
section sees to it).
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loriner.adapters.records import QUARANTINED
from loriner.errors import AdapterStoreError

VERSION = 2
_SCHEMAS = (
    """
CREATE TABLE generations (
    digest TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    checked_base TEXT NOT NULL,
    base_digest TEXT,
    ranks TEXT NOT NULL,
    targets TEXT NOT NULL,
    num_bytes INTEGER NOT NULL,
    num_modules INTEGER NOT NULL,
    reason TEXT
) WITHOUT ROWID;
CREATE TABLE names (
    name TEXT PRIMARY KEY,
    digest TEXT NOT NULL REFERENCES generations (digest),
    alias_of TEXT,
    source TEXT NOT NULL,
    pinned INTEGER NOT NULL,
    created_at INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL REFERENCES names (name) ON DELETE CASCADE,
    digest TEXT NOT NULL REFERENCES generations (digest),
    alias_of TEXT,
    source TEXT NOT NULL,
    created_at INTEGER NOT NULL
);
CREATE INDEX names_by_digest ON names (digest);
CREATE INDEX history_by_name ON history (name, id);
CREATE INDEX history_by_digest ON history (digest);
""",
    """
CREATE TABLE templates (
    digest TEXT PRIMARY KEY REFERENCES generations (digest) ON DELETE CASCADE,
    template TEXT NOT NULL
) WITHOUT ROWID;
""",
)  # what each version adds

_GENERATION = "digest, state, checked_base, base_digest, ranks, targets, num_bytes, num_modules"
_KNOWN = f"{_GENERATION}, digest IN (SELECT digest FROM templates)"
_COLUMNS = f"name, alias_of, source, pinned, created_at, {_KNOWN}"
_NAMES = f"SELECT {_COLUMNS} FROM names JOIN generations USING (digest)"
_HISTORY = f"""SELECT {_COLUMNS} FROM
    (SELECT h.id, h.name, h.digest, h.alias_of, h.source, h.created_at, n.pinned
     FROM history h JOIN names n ON n.name = h.name)
    JOIN generations USING (digest)"""


@dataclass(frozen=True, slots=True)
class Generation:
    """What is known of a generation without opening its files."""

    digest: str
    state: str
    checked_base: str  # the base it was checked against
    base_digest: str | None  # the base it says it was trained on
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    num_bytes: int
    num_modules: int
    has_template: bool = False  # a chat template of its own


@dataclass(frozen=True, slots=True)
class Entry:
    """A name, now or at one point of its history, and the generation it stands for."""

    name: str
    alias_of: str | None
    source: str
    pinned: bool
    created_at: int
    generation: Generation


class Catalogue:
    """One writing and one reading connection; each is used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._write_lock = threading.RLock()
        self._read_lock = threading.RLock()
        self._writer = _connect(path)
        try:
            self._create()
            self._reader = _connect(path)
        except BaseException:
            self._writer.close()
            raise
        self._reader.execute("PRAGMA query_only = ON")

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block is committed and durable when it ends, or none of it."""
        with self._write_lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def find(self, name: str) -> Entry | None:
        return next(iter(self._entries(f"{_NAMES} WHERE name = ?", name)), None)

    def find_generations(self, name: str, prefix: str) -> list[Entry]:
        """The latest entry of each generation of `name` whose digest has this prefix."""
        where = f"{_HISTORY} WHERE name = ? AND digest >= ? AND digest < ? ORDER BY id"
        entries = self._entries(where, name, prefix, prefix + "g")  # "g" follows every hex digit
        return list({entry.generation.digest: entry for entry in entries}.values())

    def names(self, tenant: str | None) -> list[Entry]:
        if tenant is None:
            return self._entries(f"{_NAMES} ORDER BY name")
        within = f"{_NAMES} WHERE name >= ? AND name < ? ORDER BY name"
        return self._entries(within, f"{tenant}/", f"{tenant}0")  # "0" follows "/"

    def history(self, name: str) -> list[Entry]:
        """Newest first; the first entry is the name's present generation."""
        return self._entries(f"{_HISTORY} WHERE name = ? ORDER BY id DESC", name)

    def generation(self, digest: str) -> Generation | None:
        query = f"SELECT {_KNOWN} FROM generations WHERE digest = ?"
        return next((_generation(row) for row in self._read(query, digest)), None)

    def is_referenced(self, digest: str) -> bool:
        query = """SELECT EXISTS (SELECT 1 FROM names WHERE digest = ?)
                   OR EXISTS (SELECT 1 FROM history WHERE digest = ?)"""
        return bool(self._read(query, digest, digest)[0][0])

    def unreferenced(self) -> list[str]:
        query = """SELECT digest FROM generations WHERE digest NOT IN (SELECT digest FROM names)
                   AND digest NOT IN (SELECT digest FROM history)"""
        return [digest for (digest,) in self._read(query)]

    def states(self) -> dict[str, str]:
        """Digest -> state of every generation."""
        return dict(self._read("SELECT digest, state FROM generations"))

    def is_in_tenant(self, digest: str, tenant: str) -> bool:
        """Whether a name of `tenant` points, or pointed, at this generation."""
        query = "SELECT EXISTS (SELECT 1 FROM history WHERE digest = ? AND name >= ? AND name < ?)"
        return bool(self._read(query, digest, f"{tenant}/", f"{tenant}0")[0][0])

    def put_generation(self, row: Generation) -> None:
        """Insert it, or make a known one ready again; what it named as base is kept."""
        self._writer.execute(
            f"""INSERT INTO generations ({_GENERATION}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
               ON CONFLICT (digest) DO UPDATE SET state = excluded.state, reason = NULL,
               checked_base = excluded.checked_base,
               base_digest = coalesce(excluded.base_digest, base_digest)""",
            (
                row.digest,
                row.state,
                row.checked_base,
                row.base_digest,
                json.dumps(row.ranks),
                json.dumps(row.targets),
                row.num_bytes,
                row.num_modules,
            ),
        )

    def put_template(self, digest: str, template: str) -> None:
        self._writer.execute("INSERT OR IGNORE INTO templates VALUES (?, ?)", (digest, template))

    def template(self, digest: str) -> str | None:
        """The chat template that a generation brought."""
        rows = self._read("SELECT template FROM templates WHERE digest = ?", digest)
        return next((template for (template,) in rows), None)

    def point(self, name: str, digest: str, alias_of: str | None, source: str, at: int) -> None:
        """Point `name` at a generation; if that is a change, note it in the history."""
        before = self.find(name)
        if before is not None and before.generation.digest == digest:
            query = "UPDATE names SET alias_of = ?, source = ? WHERE name = ?"
            self._writer.execute(query, (alias_of, source, name))
            return
        self._writer.execute(
            """INSERT INTO names VALUES (?, ?, ?, ?, 0, ?) ON CONFLICT (name) DO UPDATE SET
               digest = excluded.digest, alias_of = excluded.alias_of, source = excluded.source,
               created_at = excluded.created_at""",
            (name, digest, alias_of, source, at),
        )
        self._writer.execute(
            """INSERT INTO history (name, digest, alias_of, source, created_at)
               VALUES (?, ?, ?, ?, ?)""",
            (name, digest, alias_of, source, at),
        )

    def trim_history(self, name: str, keep: int) -> None:
        """Forget all but the latest `keep` entries of a name."""
        self._writer.execute(
            """DELETE FROM history WHERE name = ? AND id NOT IN
               (SELECT id FROM history WHERE name = ? ORDER BY id DESC LIMIT ?)""",
            (name, name, keep),
        )

    def set_pinned(self, name: str, pinned: bool) -> None:
        self._writer.execute("UPDATE names SET pinned = ? WHERE name = ?", (pinned, name))

    def set_quarantined(self, digest: str, reason: str) -> None:
        self._writer.execute(
            "UPDATE generations SET state = ?, reason = ? WHERE digest = ?",
            (QUARANTINED, reason, digest),
        )

    def delete_name(self, name: str) -> None:
        self._writer.execute("DELETE FROM names WHERE name = ?", (name,))

    def delete_generation(self, digest: str) -> None:
        self._writer.execute("DELETE FROM generations WHERE digest = ?", (digest,))

    def _create(self) -> None:
        with self.transaction():
            (version,) = self._writer.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise AdapterStoreError("The adapter store was written by a newer version.")
            for schema in _SCHEMAS[version:]:
                for statement in schema.split(";\n"):
                    self._writer.execute(statement)
            self._writer.execute(f"PRAGMA user_version = {VERSION}")

    def _entries(self, query: str, *values: object) -> list[Entry]:
        return [
            Entry(name, alias_of, source, bool(pinned), created_at, _generation(rest))
            for name, alias_of, source, pinned, created_at, *rest in self._read(query, *values)
        ]

    def _read(self, query: str, *values: object) -> list[Any]:
        """What is committed; also inside a transaction of our own."""
        with self._read_lock:
            return self._reader.execute(query, values).fetchall()


def _generation(row: Sequence[Any]) -> Generation:
    digest, state, checked_base, base_digest, ranks, targets, num_bytes, num_modules, own = row
    return Generation(
        digest,
        state,
        checked_base,
        base_digest,
        tuple(json.loads(ranks)),
        tuple(json.loads(targets)),
        num_bytes,
        num_modules,
        bool(own),
    )


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection
