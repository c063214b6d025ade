"""Tar, gzipped tar and zip as streams of members, each bound checked before it is spent.

Python's zipfile trusts the directory of an archive, so that is measured first; tar is in `tar.py`.
Knows no adapter. Invariant: no member's bytes are read beyond the size it declares, and nothing is
read beyond the byte limit of the whole.
"""

from __future__ import annotations

import errno
import gzip
import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from loriner.adapters.names import show
from loriner.adapters.tar import BLOCK, Limited, Member, Readable, checksum_holds, tar_members
from loriner.errors import InvalidAdapterError, PayloadTooLargeError

MAX_DIRECTORY_BYTES = 1 << 20

# What gzip, zlib and zipfile raise on hostile bytes; ValueError covers slips in zipfile.
_DAMAGE = (
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
    zipfile.BadZipFile,
    NotImplementedError,
    ValueError,
    struct.error,
)


def members(path: Path, max_bytes: int, max_members: int) -> Iterator[Member]:
    """The members of the archive at `path`, recognised by its first bytes.

    Each member's content must be read, or left, before the next is asked for. Raises
    InvalidAdapterError when it is cut, damaged or of another kind, PayloadTooLargeError when it
    unpacks to more than max_bytes.
    """
    with path.open("rb") as file, _refusing_damage():
        for member in _open(file, max_bytes, max_members):
            yield replace(member, content=_Guarded(member.content))


def _open(file: IO[bytes], max_bytes: int, max_members: int) -> Iterator[Member]:
    head = file.read(BLOCK)
    file.seek(0)
    if head[:2] == b"\x1f\x8b":
        with gzip.GzipFile(fileobj=file) as unzipped:
            yield from tar_members(Limited(unzipped, max_bytes), max_members)
    elif head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        yield from _zip_members(file, max_bytes, max_members)
    elif len(head) == BLOCK and checksum_holds(head):
        yield from tar_members(Limited(file, max_bytes), max_members)
    else:
        raise InvalidAdapterError(["the archive is not .tar, .tar.gz or .zip"])


@contextmanager
def _refusing_damage() -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise _damaged(error) from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # zipfile seeks wherever a damaged directory points
            raise
        raise _damaged(error) from None


def _damaged(error: Exception) -> InvalidAdapterError:
    return InvalidAdapterError([f"the archive is cut or damaged: {show(str(error))}"])


class _Guarded:
    """A member's content as its reader sees it: damage is a refusal there too."""

    def __init__(self, content: Readable) -> None:
        self._content = content

    def read(self, size: int, /) -> bytes:
        with _refusing_damage():
            return self._content.read(size)


def _zip_members(file: IO[bytes], max_bytes: int, max_members: int) -> Iterator[Member]:
    _measure_directory(file)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len(entries) > max_members:
            raise InvalidAdapterError([f"the archive has more than {max_members} members"])
        if sum(entry.file_size for entry in entries) > max_bytes:
            raise PayloadTooLargeError(f"The archive unpacks to more than {max_bytes} bytes.")
        for entry in entries:
            name = entry.orig_filename
            kind = _zip_kind(entry)
            if kind != "file":
                yield Member(name, kind, 0, io.BytesIO())
                continue
            with archive.open(entry) as content:
                yield Member(name, kind, entry.file_size, content)


def _measure_directory(file: IO[bytes]) -> None:
    """Refuse a central directory that would cost much to read, found the way zipfile finds it."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - (1 << 16) - 22 - 20))
    tail = file.read()
    file.seek(0)
    is_bare = tail[-22:-18] == b"PK\x05\x06" and tail[-2:] == b"\0\0"
    at = len(tail) - 22 if is_bare else tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise InvalidAdapterError(["the archive is cut: its directory is missing"])
    if tail[max(0, at - 20) : at].startswith(b"PK\x06\x07"):
        raise InvalidAdapterError(["zip64 archives are not taken; use .tar"])
    if int.from_bytes(tail[at + 12 : at + 16], "little") > MAX_DIRECTORY_BYTES:
        raise InvalidAdapterError(["the archive's directory is too large"])


def _zip_kind(entry: zipfile.ZipInfo) -> str:
    mode = entry.external_attr >> 16
    if stat.S_ISLNK(mode):
        return "a link"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a device"
    if entry.flag_bits & 1:
        return "encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed in an unknown way"
    return "folder" if entry.orig_filename.endswith("/") else "file"
