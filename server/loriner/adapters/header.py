"""The header of a safetensors file, checked before any library allocates by it.

safetensors itself is safe against code and not against cost or trickery: it takes 200,000 tensors,
a key twice, empty tensors and any name. Invariant: a returned header describes the file's bytes
exactly.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loriner.adapters.names import show
from loriner.adapters.strict_json import parse_object
from loriner.errors import InvalidAdapterError

MAX_TENSORS = 10_000
MIN_HEADER_LIMIT = 1 << 20
HEADER_BYTES_PER_MODULE = 1024  # three tensors of a module take about 450
MAX_NAME_CHARS = 256

ITEM_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the header; `start` and `end` count from the first byte after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def header_limit(num_modules: int) -> int:
    """The largest header, in bytes, that an adapter for a base of `num_modules` may have."""
    return max(MIN_HEADER_LIMIT, HEADER_BYTES_PER_MODULE * num_modules)


def read_header(path: Path, num_modules: int = 0) -> dict[str, TensorInfo]:
    """Tensor name -> entry, for a file that is whole and plain. Raises InvalidAdapterError."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if kind := foreign_format(head):
            raise InvalidAdapterError([f"{path.name} is {kind}, not safetensors"])
        if len(head) < 8:
            raise InvalidAdapterError([f"{path.name} is cut: it has {num_bytes} bytes"])
        (length,) = struct.unpack("<Q", head)
        limit = header_limit(num_modules)
        if length > limit:
            raise InvalidAdapterError(
                [f"the header of {path.name} claims {length} bytes, at most {limit} are taken"]
            )
        if 8 + length > num_bytes:
            raise InvalidAdapterError([f"{path.name} is cut inside its header"])
        document = parse_object(file.read(length), f"the header of {path.name}", limit)
    return _check(document, num_bytes - 8 - length)


def foreign_format(head: bytes) -> str | None:
    """What `head`, the first bytes of a file, gives away as something that may run code."""
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        # A protocol frame; a safetensors header of that length would pass every limit.
        return "a pickle"
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "a zip archive (torch.save writes pickles in zips)"
    if head[:6] == b"\x93NUMPY":
        return "a NumPy file"
    return "an HDF5 file" if head[:4] == b"\x89HDF" else None


def _check(document: dict[str, Any], num_data_bytes: int) -> dict[str, TensorInfo]:
    metadata = document.pop("__metadata__", {})
    reasons = []
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        reasons.append("the header's __metadata__ must map text to text")
    if len(document) > MAX_TENSORS:
        raise InvalidAdapterError(
            [f"the file has {len(document)} tensors, at most {MAX_TENSORS} are taken"]
        )
    if not document:
        raise InvalidAdapterError(["the file has no tensors"])
    tensors, faults = _entries(document)
    reasons += faults
    if not reasons and not _is_contiguous(tensors.values(), num_data_bytes):
        reasons.append(
            f"the tensors do not cover the file's {num_data_bytes} data bytes exactly: "
            "it is cut, overlong or has overlapping tensors"
        )
    if reasons:
        raise InvalidAdapterError(reasons)
    return tensors


def _entries(document: dict[str, Any]) -> tuple[dict[str, TensorInfo], list[str]]:
    tensors: dict[str, TensorInfo] = {}
    faults: dict[str, list[str]] = {}
    for name, entry in document.items():
        parsed = _entry(name, entry)
        if isinstance(parsed, TensorInfo):
            tensors[name] = parsed
        else:
            faults.setdefault(parsed, []).append(name)
    return tensors, [f"{fault}: {listing(names)}" for fault, names in faults.items()]


def _entry(name: str, entry: object) -> TensorInfo | str:
    """The entry, or what is wrong with it."""
    if not (1 <= len(name) <= MAX_NAME_CHARS and name.isascii() and name.isprintable()):
        return f"tensor names must be 1 to {MAX_NAME_CHARS} printable ASCII characters"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "tensor entries must have exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"tensors must be {', '.join(ITEM_BYTES)}, not {show(str(dtype), 16)}"
    if not _are_sizes(shape) or not 1 <= len(shape) <= 2:
        return "tensors must have one or two dimensions, each a size"
    if 0 in shape:
        return "tensors must not be empty"
    if not _are_sizes(offsets) or len(offsets) != 2:
        return "data_offsets must be two byte positions"
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        return "data_offsets must span exactly shape x dtype"
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 40 for v in values)


def _is_contiguous(tensors: Iterable[TensorInfo], num_bytes: int) -> bool:
    position = 0
    for tensor in sorted(tensors, key=lambda t: t.start):
        if tensor.start != position:
            return False
        position = tensor.end
    return position == num_bytes


def listing(names: Iterable[str], limit: int = 5) -> str:
    """The first few of `names`, and how many more there are."""
    names = list(names)
    shown = ", ".join(show(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
