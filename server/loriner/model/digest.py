"""`base_digest`: SHA-256 over the tensors that serve; its cache is `loriner.json` beside them.

Canonical order: one record for each weight, norm and bias that the model uses, sorted by name (with
".weight" or ".bias", by code point). A record is JSON [name, kind, shape] and a newline, then each
part as 8 bytes of length (little-endian) and its raw little-endian bytes:

    kind "nf4"          packed nibbles; absmax f32; code f32
    kind "nf4-nested"   packed nibbles; absmax u8; nested_absmax f32; nested_quant_map f32;
                        nested_offset f32; code f32
    any other kind      the tensor itself; the kind is its dtype, e.g. "bfloat16"

Files, shards, storage dtype and names of parts don't matter; every byte that is multiplied does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CACHE = "loriner.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Record:
    """What one name adds to the digest."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]


def compute(records: Iterable[Record]) -> str:
    """The digest, 64 hex digits; `records` come sorted by name."""
    digest, last = hashlib.sha256(), ""
    for record in records:
        assert record.name > last, (last, record.name)
        last = record.name
        digest.update(json.dumps([record.name, record.kind, record.shape]).encode() + b"\n")
        for part in record.parts:
            raw = part.contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numel().to_bytes(8, "little"))
            digest.update(raw.numpy().data)
    return digest.hexdigest()


def read_cache(folder: Path, files: Sequence[str]) -> str | None:
    """The stored digest, or None when there is none or a file's size or time has changed."""
    try:
        stored = json.loads((folder / CACHE).read_text(encoding="utf-8"))
        fresh = stored["format"] == FORMAT and stored["files"] == _stamps(folder, files)
        return str(stored["base_digest"]) if fresh else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cache(folder: Path, files: Sequence[str], digest: str) -> None:
    """Store the digest; a folder that cannot be written to is left without one."""
    stored = {"format": FORMAT, "base_digest": digest, "files": _stamps(folder, files)}
    part = folder / f".{CACHE}.{os.getpid()}"
    with contextlib.suppress(OSError):
        part.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        os.replace(part, folder / CACHE)


def _stamps(folder: Path, files: Sequence[str]) -> dict[str, list[int]]:
    stats = {file: (folder / file).stat() for file in files}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}
