"""What a name, a `name@digest` or a digest stands for now.

Reads the catalogue, changes nothing, opens no adapter's files. Invariant: what is called servable
can be loaded on this base, and an alias only finds generations of its own tenant.
"""

from __future__ import annotations

from loriner.adapters.catalogue import Entry, Generation
from loriner.adapters.generations import Generations
from loriner.adapters.names import AdapterName, AdapterRef, is_digest, parse_ref, show
from loriner.adapters.records import AdapterRecord, check_expected
from loriner.errors import AdapterNotFoundError


class Lookup:
    """Of one store's names. `param`: the field of the request that an error tells of."""

    def __init__(self, generations: Generations) -> None:
        self._generations, self._catalogue = generations, generations.catalogue

    def find(self, ref: AdapterRef) -> Entry | None:
        """None: nothing, or more than one generation has this digest's beginning."""
        if ref.digest is None:
            return self._catalogue.find(str(ref.name))
        found = self._catalogue.find_generations(str(ref.name), ref.digest)
        return found[0] if len(found) == 1 else None

    def entry(self, ref: AdapterRef, param: str = "adapter") -> Entry:
        """In whatever state. Raises AdapterNotFoundError."""
        entry = self.find(ref)
        if entry is None:
            raise AdapterNotFoundError(str(ref), param)
        return entry

    def servable(self, ref: AdapterRef, param: str = "adapter") -> Entry:
        """Raises AdapterNotFoundError, AdapterQuarantinedError, or InvalidAdapterError when it was
        published for another base."""
        entry = self.entry(ref, param)
        self._generations.check(entry.generation, str(ref))
        return entry

    def target(self, name: AdapterName, target: str) -> tuple[Generation, str | None, str]:
        """What the alias `name` may point at: (generation, name it was reached by, source)."""
        if is_digest(target):
            if not self._catalogue.is_in_tenant(target, name.tenant):
                raise AdapterNotFoundError(target, "target")
            return self._generations.known(target), None, "alias"
        ref = parse_ref(target, param="target")
        if ref.name.tenant != name.tenant:
            raise AdapterNotFoundError(show(target), "target")
        entry = self.servable(ref, "target")
        alias_of = None if ref.name == name else str(ref.name)
        return entry.generation, alias_of, entry.source

    def check_expected(self, name: AdapterName, expected: str | None) -> None:
        """See `records.check_expected`."""
        entry = self._catalogue.find(str(name))
        check_expected(entry.generation.digest if entry else None, str(name), expected)

    def record(self, entry: Entry) -> AdapterRecord:
        """An entry as its users see it."""
        generation = entry.generation
        return AdapterRecord(
            name=entry.name,
            short_name=entry.name.partition("/")[2],
            generation=generation.digest,
            ranks=generation.ranks,
            targets=generation.targets,
            num_bytes=generation.num_bytes,
            pinned=entry.pinned,
            created_at=entry.created_at,
            alias_of=entry.alias_of,
            base_digest=generation.base_digest,
            source=entry.source,
            state=self._generations.state(generation),
            has_template=generation.has_template,
        )
