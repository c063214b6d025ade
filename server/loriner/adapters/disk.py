"""The store's files: generations, uploads in progress, quarantine; and the order of fsyncs.

Knows folders and digests, not names. Invariant: a folder appears under `generations/` only whole
and with every byte on the disk; what is being written lies under this store's own `incoming/`.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loriner.adapters.locks import Locks
from loriner.errors import AdapterStoreError

# Numbers for `Locks`: the exclusive section, then each generation, then each open store.
SECTION = 0
_GENERATIONS = 1 << 60
_STORES = 1 << 61
_HEX_DIGITS = 14  # of a digest, or of a store's id; 56 bits stay clear of the ranges' bounds

_ID = re.compile(rf"[0-9a-f]{{{_HEX_DIGITS}}}")


class Disk:
    """The folders under one root. All but `staging` and the trash need the exclusive section."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.generations = root / "generations"
        self.quarantine = root / "quarantine"
        self._incoming = root / "incoming"
        for folder in (root, self.generations, self.quarantine, self._incoming):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.locks = Locks(root / "lock")
        self._id = secrets.token_hex(_HEX_DIGITS // 2)
        self.own = self._incoming / self._id

    def open(self) -> None:
        """Clear what dead stores left and claim a place of our own."""
        for folder in list(self._incoming.iterdir()):
            if not _ID.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
            elif self.locks.try_own(number := _STORES + int(folder.name, 16)):
                shutil.rmtree(folder, ignore_errors=True)
                self.locks.release(number)
        self.locks.try_own(_STORES + int(self._id, 16))
        self.own.mkdir(mode=0o700)
        sync_folder(self.root)

    def close(self) -> None:
        shutil.rmtree(self.own, ignore_errors=True)
        self.locks.close()

    def folder(self, digest: str) -> Path:
        return self.generations / digest

    def has(self, digest: str) -> bool:
        return self.folder(digest).is_dir()

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder that is gone when the block ends, or when the process does."""
        folder = self.own / secrets.token_hex(8)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def place(self, staged: Path, digest: str) -> None:
        """Make the synced folder `staged` the files of a generation."""
        if self.has(digest):  # left by a crash before its commit, or damaged
            self.discard(self.folder(digest))
        os.rename(staged, self.folder(digest))
        sync_folder(self.generations)

    def discard(self, folder: Path) -> None:
        """Take a folder out of sight at once; its bytes go when the trash is emptied."""
        os.rename(folder, self.own / f"trash-{secrets.token_hex(8)}")

    def empty_trash(self) -> None:
        for folder in self.own.glob("trash-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def set_aside(self, digest: str) -> None:
        """Move a generation's files to the quarantine, where nothing is ever loaded from."""
        if self.has(digest):
            os.rename(self.folder(digest), self.quarantine / f"{digest}-{secrets.token_hex(4)}")
            sync_folder(self.quarantine)
            sync_folder(self.generations)

    def hold(self, digest: str) -> bool:
        """Keep other stores from removing a generation; False while one is doing so."""
        return self.locks.try_share(_GENERATIONS + int(digest[:_HEX_DIGITS], 16))

    def own_generation(self, digest: str) -> bool:
        """Whether no other store holds a generation; if so, none can until `let_go`."""
        return self.locks.try_own(_GENERATIONS + int(digest[:_HEX_DIGITS], 16))

    def let_go(self, digest: str) -> None:
        self.locks.release(_GENERATIONS + int(digest[:_HEX_DIGITS], 16))


def sync_tree(folder: Path) -> None:
    """Bring the files directly in `folder`, and its list of them, to the disk."""
    for path in folder.iterdir():
        sync_path(path, os.O_RDONLY)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    sync_path(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_path(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn what the disk and SQLite raise into AdapterStoreError, without paths in the message."""
    try:
        yield
    except OSError as error:
        what = os.strerror(error.errno) if error.errno else type(error).__name__
        raise AdapterStoreError(f"The adapter store failed: {what}.") from error
    except sqlite3.Error as error:
        raise AdapterStoreError(f"The adapter store's catalogue failed: {error}.") from error
