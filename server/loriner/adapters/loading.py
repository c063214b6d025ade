"""From the store to an image on the host: what a loader thread does for the GPU.

Knows the store and the image; no tiers and no device. Invariant: every byte of a returned image was
verified in memory, against the generation's seal or by its digest.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor

from loriner.adapters.formats import Modules
from loriner.adapters.host import Allocate
from loriner.adapters.image import ImageLayout, SeatImage, pack_image
from loriner.adapters.seal import read_seal, seal_folder
from loriner.adapters.sealed_reader import SealedReader
from loriner.adapters.store import Store

logger = logging.getLogger(__name__)

MAX_THREADS = 8


class ImageSource:
    """generation -> image. Safe for several threads, which share the readers."""

    def __init__(
        self, store: Store, modules: Modules, layout: ImageLayout, allocate: Allocate
    ) -> None:
        num_threads = min(MAX_THREADS, os.cpu_count() or 1)
        self._store, self._modules = store, modules
        self._layout, self._allocate = layout, allocate
        self._threads = ThreadPoolExecutor(num_threads, "adapter-reader")
        self._reader = SealedReader(layout, self._threads, num_threads)

    def __call__(self, generation: str) -> SeatImage:
        """Raises what `Store.load` raises."""
        return self._sealed(generation) or self._verified(generation)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _sealed(self, generation: str) -> SeatImage | None:
        folder = self._store.path(generation)  # raises unless it can be served
        seal = read_seal(folder, generation)
        if seal is None:
            return None
        try:
            return self._reader.read(folder, seal, self._allocate)
        except OSError:
            return None  # the long way knows what it means

    def _verified(self, generation: str) -> SeatImage:
        """The long way; leaves a seal for the next time."""
        adapter = self._store.load(generation)
        image = pack_image(adapter, self._layout, self._allocate)
        folder = self._store.path(generation)
        try:
            seal_folder(folder, adapter, self._modules)
        except OSError as error:  # a full or read-only disk: loads stay slow
            logger.warning("no seal for %s: %s", generation[:12], error.strerror)
        return image
