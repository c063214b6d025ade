"""A seal: what was verified of a generation's file, so that a later load can be quick and sure.

A generation is named by one long SHA-256, 60 ms of one core for 84 MB; a seal holds SHA-256 over
stretches of the same file, for threads. It is written only after the same bytes, in memory, gave
the generation's digest; uploads cannot bring one, whoever may write the store's folder is trusted.
Invariant: a seal that does not match is no fault and proves nothing: load and verify the long way.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch
from torch import Tensor

from loriner.adapters.adapter import Adapter, LoraWeight, digest_of, templated
from loriner.adapters.formats import Modules
from loriner.adapters.formats.peft_tensors import sort_tensors
from loriner.adapters.header import read_header
from loriner.adapters.image import Module
from loriner.errors import InvalidAdapterError

SEAL_NAME = "seal"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_SEAL_BYTES = 16 << 20
STRETCH_BYTES = 1 << 20  # a stretch is whole tensors, and at least this much where there is more
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_MEMBERS = 256  # tensors of a stretch, below IOV_MAX: it is one call of preadv
_MAGIC = b"loriner seal 1\n"


class SealedTensor(msgspec.Struct, frozen=True, array_like=True):
    """One tensor: whose it is and where in the file it lies."""

    module: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    end: int


Stretch = tuple[SealedTensor, ...]  # neighbours in the file


class Form(msgspec.Struct, frozen=True, array_like=True):
    """Everything but the numbers: the same bytes for all adapters of one configuration."""

    scalings: dict[str, float]  # of each module
    stretches: tuple[Stretch, ...]

    def modules(self) -> dict[str, Module]:
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for stretch in self.stretches:
            for t in stretch:
                shapes.setdefault(t.module, {})[t.role] = t.shape
        return {
            name: Module(a[0], a[1], of["b"][0], "bias" in of, self.scalings[name])
            for name, of in shapes.items()
            for a in [of["a"]]
        }


class Seal(msgspec.Struct, frozen=True, array_like=True):
    """All that an image needs, but the weights."""

    generation: str
    form: bytes  # a Form
    digests: tuple[bytes, ...]  # SHA-256 of each stretch


def seal_folder(folder: Path, adapter: Adapter, modules: Modules) -> None:
    """Write the seal of `adapter`, whose files are in `folder`, if it can be sealed."""
    seal = make_seal(folder, adapter, modules)
    if seal is not None:
        write_seal(folder, seal)


def make_seal(folder: Path, adapter: Adapter, modules: Modules) -> Seal | None:
    """The seal of the file in `folder`, or None unless its bytes are exactly `adapter`."""
    path = folder / WEIGHTS_NAME
    try:
        tensors = list(_tensors(path, modules))
    except (InvalidAdapterError, OSError):
        return None
    stretches = tuple(_stretches(tensors))
    digests = []
    found: dict[str, dict[str, Tensor]] = {}  # module -> role -> tensor
    with path.open("rb", buffering=0) as file:
        for stretch in stretches:
            data = bytearray(num_bytes(stretch))
            if not read_at(file, [memoryview(data)], stretch[0].start):
                return None
            digests.append(hashlib.sha256(data).digest())
            for t, tensor in _cut(data, stretch):
                found.setdefault(t.module, {})[t.role] = tensor
    if not _are_of(adapter, found):
        return None
    scalings = {name: weight.scaling for name, weight in adapter.modules.items()}
    form = msgspec.msgpack.encode(Form(scalings, stretches))
    return Seal(adapter.generation, form, tuple(digests))


def _cut(data: bytearray, stretch: Stretch) -> Iterator[tuple[SealedTensor, Tensor]]:
    """The tensors whose bytes `data` is."""
    whole = torch.frombuffer(data, dtype=torch.uint8)
    first = stretch[0].start
    for t in stretch:
        part = whole[t.start - first : t.end - first].clone()  # on a boundary of its dtype
        yield t, part.view(DTYPES[t.dtype]).view(t.shape)


def _are_of(adapter: Adapter, found: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether these, with its scalings and its template, have the digest of `adapter`."""
    known = adapter.modules
    if found.keys() != known.keys() or any(not {"a", "b"} <= of.keys() for of in found.values()):
        return False
    weights = {
        name: LoraWeight(of["a"], of["b"], of.get("bias"), known[name].scaling)
        for name, of in found.items()
    }
    return templated(digest_of(weights), adapter.template) == adapter.generation


def write_seal(folder: Path, seal: Seal) -> None:
    """Whole or not at all. A seal lost to a crash costs a slow load, so it is not synced here."""
    payload = msgspec.msgpack.encode(seal)
    path = folder / f".{SEAL_NAME}-{secrets.token_hex(4)}"
    try:
        path.write_bytes(_MAGIC + hashlib.sha256(payload).digest() + payload)
        os.replace(path, folder / SEAL_NAME)
    finally:
        path.unlink(missing_ok=True)


def read_seal(folder: Path, generation: str) -> Seal | None:
    """The whole and undamaged seal of `generation`, or None."""
    try:
        with (folder / SEAL_NAME).open("rb") as file:
            data = file.read(MAX_SEAL_BYTES)
        head = len(_MAGIC) + 32
        payload = memoryview(data)[head:]
        if data[:head] != _MAGIC + hashlib.sha256(payload).digest():
            return None
        seal = msgspec.msgpack.decode(payload, type=Seal)
    except (OSError, msgspec.MsgspecError):
        return None
    return seal if seal.generation == generation else None


def _tensors(path: Path, modules: Modules) -> Iterator[SealedTensor]:
    """The adapter's tensors as the file's header has them, in order of their bytes."""
    header = read_header(path, len(modules))
    with path.open("rb") as file:
        data_start = 8 + int.from_bytes(file.read(8), "little")
    owners: Mapping[str, tuple[str, str]] = {
        name: (module, role)
        for module, roles in sort_tensors(header, modules).modules.items()
        for role, name in roles.items()
    }
    for name, info in sorted(header.items(), key=lambda item: item[1].start):
        if name in owners:
            start, end = data_start + info.start, data_start + info.end
            yield SealedTensor(*owners[name], info.dtype, info.shape, start, end)


def _stretches(tensors: list[SealedTensor]) -> Iterator[Stretch]:
    """Tensors in the order of their bytes, cut where there is a gap or enough of them."""
    members: list[SealedTensor] = []
    for t in tensors:
        if members and (
            members[-1].end != t.start
            or members[-1].end - members[0].start >= STRETCH_BYTES
            or len(members) == _MAX_MEMBERS
        ):
            yield tuple(members)
            members = []
        members.append(t)
    if members:
        yield tuple(members)


def num_bytes(stretch: Stretch) -> int:
    return stretch[-1].end - stretch[0].start


def read_at(file: BinaryIO, targets: list[memoryview], start: int) -> bool:
    """Fill `targets` from `start` on; False when the file is too short for that."""
    wanted = sum(target.nbytes for target in targets)
    return os.preadv(file.fileno(), targets, start) == wanted
