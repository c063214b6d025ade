"""A seal: what was verified of a generation's file, so that a later load can be quick and sure.

SHA-256 names a generation by one long stream, which takes one core 60 ms for 84 MB. A seal holds
SHA-256 over stretches of the same file, which threads check while they read. It is written beside
the weights only after the same bytes, in memory, gave the generation's digest; uploads cannot bring
one. Like the catalogue, it trusts whoever may write the store's folder. Invariant: a seal that does
not match is no fault and proves nothing; the caller then loads and verifies the long way.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch
from torch import Tensor

from loriner.adapters.adapter import Adapter, LoraWeight, digest_of, templated
from loriner.adapters.formats import Modules
from loriner.adapters.formats.peft_tensors import sort_tensors
from loriner.adapters.header import read_header
from loriner.adapters.image import (
    Allocate,
    ImageLayout,
    ImagePlan,
    Module,
    Place,
    SeatImage,
    plan,
    view,
)
from loriner.errors import InvalidAdapterError

SEAL_NAME = "seal"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_SEAL_BYTES = 16 << 20
STRETCH_BYTES = 1 << 20  # a stretch is whole tensors, and at least this much where there is more
MAX_FORMS = 64  # plans remembered
_MAX_MEMBERS = 256  # tensors of a stretch, below IOV_MAX: it is one call of preadv
_MAGIC = b"loriner seal 1\n"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    stretches = [tuple(members) for members in _stretches(tensors)]
    digests = []
    roles: dict[str, dict[str, Tensor]] = {}
    with path.open("rb", buffering=0) as file:
        for members in stretches:
            data = bytearray(_num_bytes(members))
            if not _read(file, [memoryview(data)], members[0].start):
                return None
            digests.append(hashlib.sha256(data).digest())
            whole = torch.frombuffer(data, dtype=torch.uint8)
            for t in members:
                part = whole[t.start - members[0].start : t.end - members[0].start]
                part = part.clone()  # on a boundary of its dtype
                roles.setdefault(t.module, {})[t.role] = part.view(_DTYPES[t.dtype]).view(t.shape)
    scalings = {name: weight.scaling for name, weight in adapter.modules.items()}
    if set(roles) != set(scalings) or any(not {"a", "b"} <= set(of) for of in roles.values()):
        return None
    found = {
        name: LoraWeight(of["a"], of["b"], of.get("bias"), scalings[name])
        for name, of in roles.items()
    }
    if templated(digest_of(found), adapter.template) != adapter.generation:
        return None
    form = msgspec.msgpack.encode(Form(scalings, tuple(stretches)))
    return Seal(adapter.generation, form, tuple(digests))


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


_Share = list[tuple[Stretch, bytes]]  # what one thread reads, with the digests


class SealedReader:
    """Reads sealed files straight into images, on some threads."""

    def __init__(self, layout: ImageLayout, threads: Executor, num_threads: int) -> None:
        self._layout, self._threads, self._num_threads = layout, threads, num_threads
        self._forms: OrderedDict[bytes, tuple[ImagePlan, tuple[Stretch, ...]]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, folder: Path, seal: Seal, allocate: Allocate) -> SeatImage | None:
        """The image, or None when a byte is not as it was sealed. Raises OSError."""
        made, stretches = self._planned(seal.form)
        if len(stretches) != len(seal.digests):
            return None
        image = SeatImage(made, allocate(made.num_bytes))
        try:
            with (folder / WEIGHTS_NAME).open("rb", buffering=0) as file:
                filler = _Filler(file, image)
                shares = _shares(stretches, seal.digests, self._num_threads)
                whole = all(list(self._threads.map(filler.fill, shares)))
        except BaseException:
            image.free()
            raise
        if whole:
            return image
        image.free()
        return None

    def _planned(self, form: bytes) -> tuple[ImagePlan, tuple[Stretch, ...]]:
        """Planned once for all adapters of one form: it takes milliseconds of one thread."""
        with self._lock:
            found = self._forms.get(form)
            if found is not None:
                self._forms.move_to_end(form)
                return found
        decoded = msgspec.msgpack.decode(form, type=Form)
        found = plan(decoded.modules(), self._layout), decoded.stretches
        with self._lock:
            self._forms[form] = found
            if len(self._forms) > MAX_FORMS:
                self._forms.popitem(last=False)
        return found


class _Filler:
    """One file on its way into one image. `fill` runs on several threads."""

    def __init__(self, file: BinaryIO, image: SeatImage) -> None:
        self._file, self._places = file, image.plan.places
        self._data = image.bytes
        self._bytes = _bytes(self._data)

    def fill(self, share: _Share) -> bool:
        return all(self._fill(stretch, digest) for stretch, digest in share)

    def _fill(self, stretch: Stretch, digest: bytes) -> bool:
        """Read it where it belongs, check it there, then convert what is stored otherwise."""
        targets: list[memoryview] = []
        converted: list[tuple[Place, SealedTensor, Tensor]] = []
        for t in stretch:
            place = self._places[t.module, t.role]
            num_bytes = t.end - t.start
            if _DTYPES[t.dtype] is place.dtype and not place.transposed:
                targets.append(self._bytes[place.offset : place.offset + num_bytes])
            else:
                scratch = torch.empty(num_bytes, dtype=torch.uint8)
                converted.append((place, t, scratch))
                targets.append(_bytes(scratch))
        if not _read(self._file, targets, stretch[0].start):
            return False
        sha = hashlib.sha256()
        for target in targets:
            sha.update(target)
        if sha.digest() != digest:
            return False
        for place, t, scratch in converted:
            tensor = scratch.view(_DTYPES[t.dtype]).view(t.shape)
            view(self._data, place).copy_(tensor.t() if place.transposed else tensor)
        return True


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


def _stretches(tensors: list[SealedTensor]) -> Iterator[list[SealedTensor]]:
    members: list[SealedTensor] = []
    for t in tensors:
        if members and (
            members[-1].end != t.start
            or members[-1].end - members[0].start >= STRETCH_BYTES
            or len(members) == _MAX_MEMBERS
        ):
            yield members
            members = []
        members.append(t)
    if members:
        yield members


def _shares(stretches: tuple[Stretch, ...], digests: tuple[bytes, ...], count: int) -> list[_Share]:
    """Neighbours to one thread, about the same number of bytes to each."""
    total = sum(map(_num_bytes, stretches))
    shares: list[_Share] = [[] for _ in range(count)]
    done = 0
    for stretch, digest in zip(stretches, digests, strict=True):
        shares[min(count - 1, done * count // total)].append((stretch, digest))
        done += _num_bytes(stretch)
    return [share for share in shares if share]


def _num_bytes(stretch: Sequence[SealedTensor]) -> int:
    return stretch[-1].end - stretch[0].start


def _bytes(data: Tensor) -> memoryview:
    found: memoryview = data.numpy().data
    return found


def _read(file: BinaryIO, targets: list[memoryview], start: int) -> bool:
    """Fill `targets` from `start` on; False when the file is too short for that."""
    wanted = sum(target.nbytes for target in targets)
    return os.preadv(file.fileno(), targets, start) == wanted
