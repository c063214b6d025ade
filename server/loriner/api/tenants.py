"""Tenants on disk: their keys (as digests) and quotas, in one JSON file beside the adapters.

Read anew whenever it changes, so that what another process revokes is revoked here at once. Knows
no door. Invariants: a key's secret is never stored; a file that cannot be read lets nobody in.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from loriner.adapters.disk import sync_folder
from loriner.adapters.locks import Locks
from loriner.adapters.names import parse_name, show
from loriner.errors import ConfigError, InvalidRequestError, KeyNotFoundError

T = TypeVar("T")
FILE, LOCK = "tenants.json", "tenants.lock"
SCOPES = ("infer", "read", "publish", "admin")
MAX_KEYS = 100_000
MAX_NOTE_CHARS = 128
MIN_WEIGHT, MAX_BOUND = 0.001, 2**53


def digest_of(token: str) -> str:
    """What is kept of a key and compared: SHA-256 of the whole, hex."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


_NOBODY = digest_of("")


class Key(msgspec.Struct, frozen=True):
    """One API key without its secret."""

    id: str
    tenant: str
    scopes: tuple[str, ...]
    digest: str  # SHA-256 of the whole key, hex
    note: str
    created_at: int  # unix seconds
    revoked_at: int | None = None


class Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of one tenant; None is none."""

    max_adapters: int | None = None
    max_bytes: int | None = None  # of all its adapters
    max_uploads: int | None = None  # in flight
    max_sequences: int | None = None  # running and queued
    tokens_per_minute: int | None = None  # prompt and output
    weight: float = 1.0  # twice the weight is twice the tokens while both wait


class Document(msgspec.Struct, frozen=True):
    keys: tuple[Key, ...] = ()
    quotas: dict[str, Quota] = {}
    version: int = 1


class Tenants:
    """One opened file; threads may share it. It is made by the first change."""

    def __init__(self, root: Path) -> None:
        self._path, self._lock_path = root / FILE, root / LOCK
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._document = Document()
        self._by_id: dict[str, Key] = {}

    @property
    def has_keys(self) -> bool:
        """Whether there is or ever was a key: revoking the last one opens nothing."""
        return bool(self._fresh().keys)

    def all_keys(self) -> tuple[Key, ...]:
        return self._fresh().keys

    def find(self, token: str) -> Key | None:
        """The key that `token` is, unless revoked; compared in constant time."""
        self._fresh()
        found = self._by_id.get(token.split("_")[1] if token.count("_") >= 2 else "")
        wanted = _NOBODY if found is None else found.digest
        is_same = hmac.compare_digest(digest_of(token), wanted)
        return found if is_same and found is not None and found.revoked_at is None else None

    def create_key(self, tenant: str, scopes: Sequence[str], note: str = "") -> tuple[Key, str]:
        """The key, and the token that is shown this once. Raises InvalidRequestError."""
        _check_tenant(tenant)
        if not scopes or any(scope not in SCOPES for scope in scopes):
            raise InvalidRequestError(f"scopes must be some of {', '.join(SCOPES)}.", "scopes")
        if len(note) > MAX_NOTE_CHARS:
            raise InvalidRequestError(f"note has at most {MAX_NOTE_CHARS} characters.", "note")
        key_id = secrets.token_hex(6)
        token = f"lor_{key_id}_{secrets.token_urlsafe(32)}"
        ordered = tuple(scope for scope in SCOPES if scope in scopes)
        key = Key(key_id, tenant, ordered, digest_of(token), note, int(time.time()))

        def add(document: Document) -> tuple[Document, Key]:
            if len(document.keys) >= MAX_KEYS:
                raise InvalidRequestError(f"There are {MAX_KEYS} keys already.", "keys")
            return msgspec.structs.replace(document, keys=(*document.keys, key)), key

        return self._change(add), token

    def revoke_key(self, key_id: str) -> Key:
        """The key is refused from now on; it stays listed. Raises KeyNotFoundError."""

        def revoke(document: Document) -> tuple[Document, Key]:
            for key in document.keys:
                if key.id == key_id:
                    gone = msgspec.structs.replace(
                        key, revoked_at=key.revoked_at or int(time.time())
                    )
                    keys = tuple(gone if one is key else one for one in document.keys)
                    return msgspec.structs.replace(document, keys=keys), gone
            raise KeyNotFoundError(show(key_id))

        return self._change(revoke)

    def quota(self, tenant: str) -> Quota:
        return self._fresh().quotas.get(tenant, Quota())

    def set_quota(self, tenant: str, quota: Quota) -> Quota:
        """Replace a tenant's quota. Raises InvalidRequestError naming the field."""
        _check_tenant(tenant)
        for name in quota.__struct_fields__:
            value = getattr(quota, name)
            low = MIN_WEIGHT if name == "weight" else 0
            if value is not None and not low <= value <= MAX_BOUND:
                raise InvalidRequestError(
                    f"{name} must be in [{low:g}, {MAX_BOUND:g}], got {value}.", name
                )

        def put(document: Document) -> tuple[Document, Quota]:
            quotas = {**document.quotas, tenant: quota}
            return msgspec.structs.replace(document, quotas=quotas), quota

        return self._change(put)

    def _change(self, change: Callable[[Document], tuple[Document, T]]) -> T:
        """Read, change and write under a lock that other processes see too; durable at the end."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        locks = Locks(self._lock_path)
        try:
            with self._lock, locks.owning(0):
                document, result = change(_read(self._path))
                _write(self._path, document)
        finally:
            locks.close()
        return result

    def _fresh(self) -> Document:
        """Raises ConfigError when the file is damaged."""
        seen = _signature(self._path)
        if seen != self._seen:
            with self._lock:
                self._document = _read(self._path)
                self._by_id = {key.id: key for key in self._document.keys}
                self._seen = seen
        return self._document


def _check_tenant(tenant: str) -> None:
    try:
        parse_name(f"{tenant}/x")
    except InvalidRequestError:
        raise InvalidRequestError(
            f"`{show(tenant)}` is not a tenant's name: 1 to 64 of a-z 0-9 . _ - that start with a "
            "letter or digit.",
            "tenant",
        ) from None


def _signature(path: Path) -> tuple[int, ...]:
    """Changes with each write: the file is replaced, so its inode is new."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def _read(path: Path) -> Document:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Document)
    except FileNotFoundError:
        return Document()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _write(path: Path, document: Document) -> None:
    """Whole or not at all, and on the disk when it returns."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(document)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    sync_folder(path.parent)
