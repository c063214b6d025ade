"""The generations of a store: files, catalogue rows and holds kept in step.

Knows digests; names are the store's. Invariants: a row that can be served has whole files on the
disk; a generation that is held, by this or another process, keeps its files; what `load` returns
was verified.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loriner.adapters import formats
from loriner.adapters.adapter import Adapter
from loriner.adapters.catalogue import Catalogue, Generation
from loriner.adapters.disk import SECTION, Disk
from loriner.adapters.formats import BaseTensor, Modules
from loriner.adapters.names import is_digest, show
from loriner.adapters.records import OTHER_BASE, QUARANTINED, READY
from loriner.errors import (
    AdapterNotFoundError,
    AdapterQuarantinedError,
    InvalidAdapterError,
)


class Generations:
    """All generations under `root`. Methods marked "in the section" need `exclusive`."""

    def __init__(
        self, root: Path, modules: Modules, base_digest: str, base_tensor: BaseTensor | None
    ) -> None:
        self.modules = modules
        self.base_digest = base_digest
        self._base_tensor = base_tensor
        self._section = threading.Lock()
        self._counts: dict[str, int] = {}
        self._counts_lock = threading.Lock()
        self.disk = Disk(root)
        try:
            with self.disk.locks.owning(SECTION):
                self.disk.open()
                self.catalogue = Catalogue(root / "catalogue.sqlite")
        except BaseException:
            self.disk.close()
            raise
        try:
            self._sweep()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with self._section, self._counts_lock:
            self._counts.clear()
            self.catalogue.close()
            self.disk.close()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The section: one writer at a time, over all threads and processes."""
        try:
            with self._section, self.disk.locks.owning(SECTION):
                yield
        finally:
            self.disk.empty_trash()

    def state(self, generation: Generation) -> str:
        if generation.state == READY and generation.checked_base != self.base_digest:
            return OTHER_BASE
        return generation.state

    def check(self, generation: Generation, name: str) -> None:
        """Raise unless `generation` can be served; `name` is what the caller called it."""
        state = self.state(generation)
        if state == QUARANTINED:
            raise AdapterQuarantinedError(
                f"The adapter `{show(name)}` is quarantined: its files no longer match its digest."
            )
        if state == OTHER_BASE:
            raise InvalidAdapterError(
                [f"`{show(name)}` was published for another base; publish it again for this one"]
            )

    def known(self, digest: str) -> Generation:
        """The row of a generation that can be served. Raises what `check` raises, or NotFound."""
        generation = self.catalogue.generation(digest) if is_digest(digest) else None
        if generation is None:
            raise AdapterNotFoundError(show(digest))
        self.check(generation, digest)
        return generation

    def is_present(self, digest: str) -> bool:
        """Whether it is in the store, whole as far as is known, and checked against this base."""
        generation = self.catalogue.generation(digest)
        return generation is not None and self.state(generation) == READY and self.disk.has(digest)

    def read(self, folder: Path) -> Adapter:
        return formats.load(
            folder, self.modules, base_digest=self.base_digest, base_tensor=self._base_tensor
        )

    def describe(self, adapter: Adapter) -> Generation:
        """The row that a checked adapter gets."""
        return Generation(
            digest=adapter.generation,
            state=READY,
            checked_base=self.base_digest,
            base_digest=adapter.base_digest,
            ranks=adapter.ranks,
            targets=adapter.targets,
            num_bytes=adapter.num_bytes,
            num_modules=len(adapter.modules),
            has_template=adapter.template is not None,
        )

    def add(
        self,
        staged: Path,
        generation: Generation,
        template: str | None,
        point: Callable[[], None],
    ) -> bool:
        """Place files and row, and run `point` in the same transaction. In the section.

        Returns whether the generation was there already. On an error nothing of it can be served.
        """
        existed = self.is_present(generation.digest)
        try:
            if not existed:
                self.disk.place(staged, generation.digest)
            with self.catalogue.transaction():
                self.catalogue.put_generation(generation)
                if template is not None:
                    self.catalogue.put_template(generation.digest, template)
                point()
        except BaseException:
            with suppress(OSError, sqlite3.Error):  # what stays has no row; the next sweep takes it
                self._take_back(generation.digest)
            raise
        return existed

    def _take_back(self, digest: str) -> None:
        if self.catalogue.generation(digest) is None and self.disk.has(digest):
            self.disk.discard(self.disk.folder(digest))

    def hold(self, digest: str, still_wanted: Callable[[], bool]) -> bool:
        """Count one holder more; `still_wanted` is asked again once other processes are kept off.

        Runs under `holding`, so that a lookup and its count are one step.
        """
        if digest in self._counts:
            self._counts[digest] += 1
            return True
        if not self.disk.hold(digest):
            return False
        if not still_wanted():
            self.disk.let_go(digest)
            return False
        self._counts[digest] = 1
        return True

    def holding(self) -> threading.Lock:
        return self._counts_lock

    def release(self, digest: str) -> None:
        """Count one holder less; the last lets a forgotten generation's files go."""
        with self._counts_lock:
            if digest not in self._counts:
                return  # the store was closed
            self._counts[digest] -= 1
            if self._counts[digest]:
                return
            del self._counts[digest]
            self.disk.let_go(digest)
        if not self.catalogue.is_referenced(digest):
            with self.exclusive():
                self.remove_garbage()

    def load(self, digest: str) -> Adapter:
        """Read and verify; damaged files go to the quarantine."""
        try:
            return self._verified(self.known(digest))
        except _DamagedError:
            pass
        with self.exclusive():  # a publish may have put it right, or a delete taken it away
            try:
                return self._verified(self.known(digest))
            except _DamagedError as damage:
                with self.catalogue.transaction():
                    self.catalogue.set_quarantined(digest, str(damage))
                self.disk.set_aside(digest)
        raise AdapterQuarantinedError(
            f"The files of {digest[:12]} no longer match that digest; they were moved aside."
        )

    def remove_garbage(self) -> None:
        """Forget generations that no name has or had, unless they are held. In the section.

        What the disk does not let go now is tried again later: the change that made it garbage
        is done.
        """
        with suppress(OSError, sqlite3.Error):
            for digest in self.catalogue.unreferenced():
                self._remove(digest)

    def _remove(self, digest: str) -> None:
        with self._counts_lock:
            if digest in self._counts or not self.disk.own_generation(digest):
                return
        try:
            with self.catalogue.transaction():
                self.catalogue.delete_generation(digest)
            if self.disk.has(digest):
                self.disk.discard(self.disk.folder(digest))
        finally:
            self.disk.let_go(digest)

    def _sweep(self) -> None:
        """Remove what a crash left: files without a row, rows without a name."""
        with self.exclusive():
            states = self.catalogue.states()
            for folder in list(self.disk.generations.iterdir()):
                if folder.name not in states:
                    self.disk.discard(folder)
                elif states[folder.name] == QUARANTINED:
                    self.disk.set_aside(folder.name)
            self.remove_garbage()

    def _verified(self, known: Generation) -> Adapter:
        """Its files, if they still are what was published. Raises _DamagedError."""
        try:
            adapter = self.read(self.disk.folder(known.digest))
            adapter = adapter.with_template(self.catalogue.template(known.digest))
        except InvalidAdapterError as error:
            raise _DamagedError(str(error)) from error
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EIO):
                raise
            raise _DamagedError(os.strerror(error.errno)) from error
        if adapter.generation != known.digest:
            raise _DamagedError(f"its files have the digest {adapter.generation}")
        return dataclasses.replace(adapter, base_digest=known.base_digest)


class _DamagedError(Exception):
    """A generation's files are not what was published."""
