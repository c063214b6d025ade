"""The adapter store on disk: names that stand for immutable generations.

Thread-safe, synchronous (doors call it through `asyncio.to_thread`), and safe for several processes
on one root. Invariants: a name only ever stands for a generation whose bytes are whole and on the
disk; what `load` returns has exactly the digest it was asked for; a held generation's files stay.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from pathlib import Path

from loriner.adapters.adapter import Adapter
from loriner.adapters.catalogue import Entry, Generation
from loriner.adapters.disk import storage_errors, sync_tree
from loriner.adapters.formats import BaseTensor, Modules
from loriner.adapters.generations import Generations
from loriner.adapters.intake import Limits, collect
from loriner.adapters.lookup import Lookup
from loriner.adapters.names import AdapterName, AdapterRef, parse_name, parse_ref, show
from loriner.adapters.records import READY, AdapterRecord, PublishReport
from loriner.adapters.seal import seal_folder
from loriner.adapters.template import CheckTemplate, refuse_template, take_template
from loriner.errors import AdapterNotFoundError, AdapterStoreError, InvalidAdapterError

Records = list[AdapterRecord]

MAX_SOURCE = 128
HOLD_TIMEOUT_S = 10.0
HOLD_RETRY_S = 0.001


class Store:
    """One opened store. `modules` and `base_digest` are the base's; `base_tensor`: `formats.load`.

    Of each name the latest `max_history` generations are kept. Do not carry a store across fork().
    """

    def __init__(
        self,
        root: Path,
        modules: Modules,
        base_digest: str,
        *,
        limits: Limits | None = None,
        base_tensor: BaseTensor | None = None,
        check_template: CheckTemplate = refuse_template,
        max_history: int = 32,
    ) -> None:
        assert max_history > 0
        self.root = root
        self.base_digest = base_digest
        self._limits = limits or Limits()
        self._max_history = max_history
        self._check_template = check_template
        with storage_errors():
            self._generations = Generations(root, modules, base_digest, base_tensor)
        self._catalogue = self._generations.catalogue
        self._lookup = Lookup(self._generations)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up every hold. What was published stays; a later `release` does nothing."""
        self._generations.close()

    def staging(self) -> AbstractContextManager[Path]:
        """An empty folder to unpack an upload in, on the store's disk, gone when the block ends."""
        return self._generations.disk.staging()

    def publish(
        self,
        folder: Path,
        name: str,
        *,
        expected_generation: str | None = None,
        source: str = "upload",
    ) -> PublishReport:
        """Check the adapter in `folder`, copy it in, point `name` at it. Durable when it returns.

        `expected_generation`: the digest (12 hex digits or more) that the name must stand for now;
        an empty text means that the name must be new. Raises InvalidAdapterError with every reason,
        InvalidRequestError for the name, AdapterConflictError, PayloadTooLargeError,
        AdapterStoreError.
        """
        full = parse_name(name)
        if not folder.is_dir():
            raise InvalidAdapterError(["there is no such folder"])
        with storage_errors(), self.staging() as staged:
            self._lookup.check_expected(full, expected_generation)
            ignored = collect(folder, staged, self._limits).ignored
            template, unused = take_template(staged, self._check_template)
            adapter = self._generations.read(staged).with_template(template)
            generation = self._generations.describe(adapter)
            seal_folder(staged, adapter, self._generations.modules)
            sync_tree(staged)
            with self._generations.exclusive():
                self._lookup.check_expected(full, expected_generation)
                existed = self._generations.add(
                    staged,
                    generation,
                    adapter.template,
                    lambda: self._point(full, generation, None, source),
                )
                entry = self._lookup.entry(AdapterRef(full))
                self._generations.remove_garbage()
        return self._report(entry, existed, (*ignored, *unused))

    def resolve(self, name: str) -> AdapterRecord:
        """What `name` or `name@digest` stands for now.

        Raises AdapterNotFoundError, AdapterQuarantinedError, or InvalidAdapterError when it was
        published for another base.
        """
        with storage_errors():
            return self._lookup.record(self._lookup.servable(parse_ref(name)))

    def acquire(self, name: str) -> AdapterRecord:
        """`resolve`, and keep the generation's files until the matching `release`."""
        ref = parse_ref(name)
        give_up_at = time.monotonic() + HOLD_TIMEOUT_S
        with storage_errors():
            while True:
                with self._generations.holding():
                    entry = self._lookup.servable(ref)
                    if self._hold(ref, entry.generation.digest):
                        return self._lookup.record(entry)
                if time.monotonic() > give_up_at:
                    raise AdapterStoreError("Another process keeps the adapter locked.")
                time.sleep(HOLD_RETRY_S)

    def release(self, generation: str) -> None:
        """Give back one `acquire`. The last one lets a deleted generation's files go."""
        with storage_errors():
            self._generations.release(generation)

    def list(self, tenant: str | None = None, *, all_states: bool = False) -> Records:
        """Names in order, of all tenants or one; only what can be served unless `all_states`."""
        with storage_errors():
            records = [self._lookup.record(entry) for entry in self._catalogue.names(tenant)]
        return [record for record in records if all_states or record.state == READY]

    def get(self, name: str) -> AdapterRecord:
        """The record of a name in whatever state. Raises AdapterNotFoundError."""
        with storage_errors():
            return self._lookup.record(self._lookup.entry(parse_ref(name)))

    def history(self, name: str) -> Records:
        """The generations a name stood for, newest (the present one) first."""
        full = _plain(name)
        with storage_errors():
            entries = self._catalogue.history(str(full))
        if not entries:
            raise AdapterNotFoundError(str(full))
        return [self._lookup.record(entry) for entry in entries]

    def set_alias(
        self, name: str, target: str, *, expected_generation: str | None = None
    ) -> AdapterRecord:
        """Point `name` at what `target` stands for now: a name, `name@digest`, or a digest.

        Later publishes of the target do not move it. Only generations that a name of the same
        tenant has, or had, can be reached. Raises AdapterNotFoundError, AdapterConflictError,
        InvalidRequestError.
        """
        full = parse_name(name)
        with storage_errors(), self._generations.exclusive():
            self._lookup.check_expected(full, expected_generation)
            generation, alias_of, source = self._lookup.target(full, target)
            with self._catalogue.transaction():
                self._point(full, generation, alias_of, source)
            self._generations.remove_garbage()
            return self._lookup.record(self._lookup.entry(AdapterRef(full)))

    def delete(self, name: str, *, expected_generation: str | None = None) -> AdapterRecord:
        """Forget a name and its history; other names of the same generations stay."""
        full = _plain(name)
        with storage_errors(), self._generations.exclusive():
            entry = self._lookup.entry(AdapterRef(full))
            self._lookup.check_expected(full, expected_generation)
            with self._catalogue.transaction():
                self._catalogue.delete_name(entry.name)
            self._generations.remove_garbage()
            return self._lookup.record(entry)

    def set_pinned(self, name: str, pinned: bool) -> AdapterRecord:
        """Mark a name as one to keep ready to run, or take the mark away."""
        full = _plain(name)
        with storage_errors(), self._generations.exclusive():
            self._lookup.entry(AdapterRef(full))
            with self._catalogue.transaction():
                self._catalogue.set_pinned(str(full), pinned)
            return self._lookup.record(self._lookup.entry(AdapterRef(full)))

    def path(self, generation: str) -> Path:
        """The folder of a generation that can be served; it stays while the generation is held."""
        with storage_errors():
            return self._generations.disk.folder(self._generations.known(generation).digest)

    def load(self, generation: str) -> Adapter:
        """Read a generation into memory and verify it. Damaged files go to the quarantine.

        Raises AdapterNotFoundError, AdapterQuarantinedError, AdapterStoreError, or
        InvalidAdapterError when it was published for another base.
        """
        with storage_errors():
            return self._generations.load(generation)

    def template(self, generation: str) -> str | None:
        """The chat template that a generation brought. Raises what `load` raises."""
        with storage_errors():
            known = self._generations.known(generation)
            return self._catalogue.template(known.digest)

    def _point(
        self, name: AdapterName, generation: Generation, alias_of: str | None, source: str
    ) -> None:
        text = show(source, MAX_SOURCE)
        self._catalogue.point(str(name), generation.digest, alias_of, text, int(time.time()))
        self._catalogue.trim_history(str(name), self._max_history)

    def _hold(self, ref: AdapterRef, digest: str) -> bool:
        def still_wanted() -> bool:
            entry = self._lookup.find(ref)
            return entry is not None and entry.generation.digest == digest

        return self._generations.hold(digest, still_wanted)

    def _report(self, entry: Entry, existed: bool, ignored: tuple[str, ...]) -> PublishReport:
        generation = entry.generation
        return PublishReport(
            name=entry.name,
            generation=generation.digest,
            ranks=generation.ranks,
            targets=generation.targets,
            num_bytes=generation.num_bytes,
            modules_matched=generation.num_modules,
            modules_total=len(self._generations.modules),
            created_at=entry.created_at,
            existed=existed,
            ignored=ignored,
        )


def _plain(name: str) -> AdapterName:
    """A name without `@digest`; what cannot be one does not exist."""
    ref = parse_ref(name)
    if ref.digest is not None:
        raise AdapterNotFoundError(show(name))
    return ref.name
