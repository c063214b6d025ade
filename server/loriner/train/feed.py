"""Documents -> passes: which documents one forward and backward takes, step after step.

Invariant: the order depends on the seed and the step alone, so a run that resumes at a step sees
what it would have seen.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Sequence

from loriner.train.masks import Document

Pass = list[Document]


class Feed:
    """The passes of one job. Without packing a pass is `batch` documents; with it, as many as fit
    into `batch` packs of `max_length` tokens, packed once and shuffled anew in each epoch."""

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        batch: int,
        accumulation: int,
        seed: int,
        pack_length: int = 0,
    ) -> None:
        assert documents
        self._seed, self._batch, self._accumulation = seed, batch, accumulation
        units: list[Pass] = [[document] for document in documents]
        if pack_length:
            units = pack([units[i][0] for i in self._order(-1, len(units))], pack_length)
        self._units = units
        self._epoch, self._shuffled = -1, list[int]()
        self.steps_per_epoch = math.ceil(len(units) / (batch * accumulation))

    @property
    def num_units(self) -> int:
        """Documents, or packs."""
        return len(self._units)

    def passes(self, step: int) -> list[Pass]:
        """The passes of optimiser step `step` (from 0): `accumulation` of them, fewer at an
        epoch's end."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._shuffled = epoch, self._order(epoch, len(self._units))
        size = self._batch * self._accumulation
        taken = self._shuffled[place * size : (place + 1) * size]
        return [
            [document for unit in taken[i : i + self._batch] for document in self._units[unit]]
            for i in range(0, len(taken), self._batch)
        ]

    def _order(self, epoch: int, count: int) -> list[int]:
        order = list(range(count))
        random.Random(f"{self._seed} epoch {epoch}").shuffle(order)
        return order


def pack(documents: Sequence[Document], length: int) -> list[Pass]:
    """Packs of at most `length` tokens: longest first, each into the fullest pack it fits in."""
    packs: list[Pass] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for document in sorted(documents, key=lambda d: -len(d.token_ids)):
        size = len(document.token_ids)
        assert size <= length, "documents are cut to max_length before they are packed"
        place = bisect.bisect_left(rooms, (size, -1))
        if place == len(rooms):
            packs.append([document])
            bisect.insort(rooms, (length - size, len(packs) - 1))
        else:
            room, index = rooms.pop(place)
            packs[index].append(document)
            bisect.insort(rooms, (room - size, index))
    return packs
