"""Sealed files, read straight into images on some threads.

Knows no catalogue and no slow way. Invariant: an image is given only when every byte of it is as it
was sealed.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from concurrent.futures import Executor
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch
from torch import Tensor

from loriner.adapters.host import Allocate
from loriner.adapters.image import ImageLayout, ImagePlan, Place, SeatImage, plan, write
from loriner.adapters.seal import (
    DTYPES,
    WEIGHTS_NAME,
    Form,
    Seal,
    SealedTensor,
    Stretch,
    num_bytes,
    read_at,
)

MAX_FORMS = 64  # plans remembered
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
            size = t.end - t.start
            if DTYPES[t.dtype] is place.dtype and not place.transposed:
                targets.append(self._bytes[place.offset : place.offset + size])
            else:
                scratch = torch.empty(size, dtype=torch.uint8)
                converted.append((place, t, scratch))
                targets.append(_bytes(scratch))
        if not read_at(self._file, targets, stretch[0].start):
            return False
        sha = hashlib.sha256()
        for target in targets:
            sha.update(target)
        if sha.digest() != digest:
            return False
        for place, t, scratch in converted:
            write(self._data, place, scratch.view(DTYPES[t.dtype]).view(t.shape))
        return True


def _shares(stretches: tuple[Stretch, ...], digests: tuple[bytes, ...], count: int) -> list[_Share]:
    """Neighbours to one thread, about the same number of bytes to each."""
    total = sum(map(num_bytes, stretches))
    shares: list[_Share] = [[] for _ in range(count)]
    done = 0
    for stretch, digest in zip(stretches, digests, strict=True):
        shares[min(count - 1, done * count // total)].append((stretch, digest))
        done += num_bytes(stretch)
    return [share for share in shares if share]


def _bytes(data: Tensor) -> memoryview:
    found: memoryview = data.numpy().data
    return found
