"""Tar as a stream of members, read here because Python's tarfile reads headers of any size.

Knows ustar, GNU long names and pax headers; sparse files and the like are refused. Invariant:
memory is bounded by one block or one small extension header, whatever the archive says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from loriner.errors import InvalidAdapterError, PayloadTooLargeError

BLOCK = 512
CHUNK = 1 << 20
MAX_PAX_BYTES = 64 << 10
MAX_LONG_NAME = 4096
MAX_TRAILER = 1 << 20  # padding after a tar's end


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Member:
    """One entry. `kind` is "file", "folder", or what it is instead: "a link", "a device"."""

    name: str
    kind: str
    size: int
    content: Readable


class Limited:
    """A stream that refuses to give more than it may, and to end in the middle of a read."""

    def __init__(self, stream: Readable, max_bytes: int) -> None:
        self._stream = stream
        self._left = max_bytes
        self._max_bytes = max_bytes

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(min(size, CHUNK))
        self._left -= len(data)
        if self._left < 0:
            raise PayloadTooLargeError(f"The archive unpacks to more than {self._max_bytes} bytes.")
        return data

    def read_exactly(self, size: int) -> bytes:
        assert size <= CHUNK
        data = b""
        while len(data) < size:
            more = self.read(size - len(data))
            if not more:
                raise EOFError("it ends inside a member")
            data += more
        return data


class _Body:
    """One tar member's bytes; what is not read is skipped, with the padding, by `finish`."""

    def __init__(self, stream: Limited, size: int) -> None:
        self._stream = stream
        self._left = size
        self._padding = -size % BLOCK

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(min(size, self._left)) if self._left else b""
        if self._left and not data:
            raise EOFError("it ends inside a member")
        self._left -= len(data)
        return data

    def finish(self) -> None:
        while self.read(CHUNK):
            pass
        self._stream.read_exactly(self._padding)
        self._padding = 0


def tar_members(stream: Limited, max_members: int) -> Iterator[Member]:
    extra: dict[str, str] = {}
    for _ in range(3 * max_members + 1):  # a member may have two extension headers
        header = stream.read_exactly(BLOCK)
        if header == bytes(BLOCK):
            return _read_trailer(stream)
        if not checksum_holds(header):
            raise InvalidAdapterError(["the archive is damaged: a header's checksum is wrong"])
        kind = header[156:157]
        size = _number(header[124:136])
        if kind in (b"x", b"g", b"L", b"K"):
            extra |= _extension(stream, kind, size)
            continue
        size = int(extra.get("size", size))
        body = _Body(stream, size)
        name = extra.get("path") or _tar_name(header)
        yield Member(name, _tar_kind(kind, name), size, body)
        body.finish()
        extra = {}
    raise InvalidAdapterError([f"the archive has more than {max_members} members"])


def _read_trailer(stream: Limited) -> None:
    """Read what follows the end, so that a gzip stream's checksum is verified."""
    left = MAX_TRAILER
    while data := stream.read(CHUNK):
        left -= len(data)
        if left < 0 or data.strip(b"\0"):
            raise InvalidAdapterError(["the archive has data after its end"])


def _extension(stream: Limited, kind: bytes, size: int) -> dict[str, str]:
    """A pax or GNU header: the real name and size of the next member."""
    if size > (MAX_LONG_NAME if kind in (b"L", b"K") else MAX_PAX_BYTES):
        raise InvalidAdapterError(["the archive has an oversized extension header"])
    data = stream.read_exactly(size)
    stream.read_exactly(-size % BLOCK)
    if kind == b"K":
        return {}  # the target of a link, which is refused by its own header
    if kind == b"L":
        return {"path": _text(data.rstrip(b"\0"))}
    records = _pax_records(data)
    if kind == b"g" and {"path", "size"} & set(records):
        raise InvalidAdapterError(["the archive renames members globally"])
    if any(key.startswith("GNU.sparse") for key in records):
        raise InvalidAdapterError(["the archive has sparse members"])
    return {key: records[key] for key in ("path", "size") if key in records}


def _pax_records(data: bytes) -> dict[str, str]:
    """`LENGTH KEY=VALUE\\n` records, LENGTH counting itself (POSIX pax, "pax Extended Header")."""
    records = {}
    while data:
        digits, space, _ = data[:8].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = data[len(digits) + 1 : length]
        if not 0 < length <= len(data) or record[-1:] != b"\n" or b"=" not in record:
            raise InvalidAdapterError(["the archive has a damaged extension header"])
        key, _, value = record[:-1].partition(b"=")
        records[_text(key)] = _text(value)
        data = data[length:]
    if not records.get("size", "0").isdecimal() or len(records.get("size", "")) > 15:
        raise InvalidAdapterError(["the archive has a damaged extension header"])
    return records


def _tar_name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return _text(name)


def _tar_kind(flag: bytes, name: str) -> str:
    if flag == b"5" or (flag == b"\0" and name.endswith("/")):
        return "folder"
    if flag in (b"0", b"\0"):
        return "file"
    kinds = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
    return kinds.get(flag, "of an unknown type")


def _number(field: bytes) -> int:
    text = field.strip(b" \0")
    if not text or any(char not in b"01234567" for char in text):
        raise InvalidAdapterError(["the archive is damaged: a member's size is not a number"])
    return int(text, 8)


def checksum_holds(header: bytes) -> bool:
    text = header[148:156].strip(b" \0")
    if not text or any(char not in b"01234567" for char in text):
        return False
    return sum(header[:148]) + 8 * ord(" ") + sum(header[156:]) == int(text, 8)


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidAdapterError(["the archive has a name that is not UTF-8"]) from None
