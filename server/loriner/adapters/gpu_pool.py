"""The GPU's seats: one slab of device memory, a table of pointers, and copies beside the steps.

`DeviceSeats` places images in the slab and starts their copies; how bytes reach a device is behind
`Copies`, and how they are put in order there is given. Invariant: bytes and table rows that were
given up are overwritten only after the last step launched before that, and a seat is ready only
once its image and its row have arrived and are in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from loriner.adapters.arena import Allocation, Arena
from loriner.adapters.image import ENTRY, ImageLayout, SeatImage
from loriner.adapters.memory import Weights
from loriner.errors import EngineFailedError

Pairs = Iterable[tuple[Tensor, Tensor]]  # (target on the device, source on the host)
Arrange = Callable[[Tensor], None]  # puts B of the seat with this row [G, 96] of the table in tiles


class Ticket:
    """A copy under way; set by whoever copies, read between steps."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = False
        self.error: Exception | None = None


class Copies(Protocol):
    """The way to the device: copies come one after another, beside the steps."""

    def start(self, pairs: Callable[[], Pairs], after: Any | None, ticket: Ticket) -> None:
        """Copy `pairs()` once the event `after` has come; then `ticket` is done. Never waits. What
        `pairs` itself has the device do comes between its copies."""

    def close(self) -> None: ...


class DeviceSeats:
    """Seats in `slab` (uint8, on the device); `table` is [max_seats, G, 96] on the device, and
    `rows` the same on the host, pinned."""

    shares_host = False

    def __init__(
        self,
        layout: ImageLayout,
        slab: Tensor,
        table: Tensor,
        rows: Tensor,
        copies: Copies,
        arrange: Arrange,
    ) -> None:
        assert table.shape == rows.shape == (len(table), len(layout.groups), ENTRY.itemsize)
        self.table = table
        self._slab, self._rows, self._copies, self._arrange = slab, rows, copies, arrange
        self._page = layout.page_bytes
        self._arena = Arena(slab.nbytes // self._page)
        self._placed: dict[int, tuple[Allocation, Ticket]] = {}
        self._launched: Any | None = None  # event of the newest launch
        self._fence: Any | None = None  # the newest launch before memory was last given up
        self.budget_bytes = self._arena.num_pages * self._page

    @property
    def used_bytes(self) -> int:
        return self.budget_bytes - self._arena.num_free * self._page

    def can_place(self, weights: Weights) -> bool:
        return self._arena.can_allocate(self._chunks(weights))

    def num_victims(self, weights: Weights, seat_ids: Iterable[int]) -> int | None:
        chunks = self._chunks(weights)
        missing = sum(chunks) - self._arena.num_free
        trial = self._arena.trial()
        count = 0
        for seat_id in seat_ids:
            if missing <= 0 and trial.can_allocate(chunks):
                return count
            allocation = self._placed[seat_id][0]
            trial.give_back(allocation)
            missing -= sum(run.num_pages for run in allocation.runs)
            count += 1
        return count if missing <= 0 and trial.can_allocate(chunks) else None

    def place(self, seat_id: int, weights: Weights) -> None:
        assert isinstance(weights, SeatImage) and seat_id not in self._placed
        image = weights
        allocation = self._arena.allocate(self._chunks(image))
        ticket = Ticket()
        self._placed[seat_id] = allocation, ticket
        self._copies.start(lambda: self._pairs(seat_id, image, allocation), self._fence, ticket)

    def clear(self, seat_id: int) -> None:
        allocation, ticket = self._placed.pop(seat_id)
        assert ticket.done or ticket.error, "its copy is under way"
        self._arena.free(allocation)
        self._fence = self._launched

    def is_ready(self, seat_id: int) -> bool:
        """Raises EngineFailedError when the copy failed."""
        ticket = self._placed[seat_id][1]
        if ticket.error is not None:
            raise EngineFailedError("An adapter could not be copied to the GPU.") from ticket.error
        return ticket.done

    def note_launch(self, event: Any) -> None:
        self._launched = event

    def check_integrity(self) -> None:
        self._arena.check_integrity()
        used = sum(run.num_pages for a, _ in self._placed.values() for run in a.runs)
        assert used == self._arena.num_pages - self._arena.num_free

    def close(self) -> None:
        self._copies.close()

    def _chunks(self, weights: Weights) -> tuple[int, ...]:
        assert isinstance(weights, SeatImage)
        return weights.plan.chunk_pages

    def _pairs(self, seat_id: int, image: SeatImage, allocation: Allocation) -> Pairs:
        """The image, in as few stretches as it has on the device, then the row of the table; what
        has come is put in order."""
        places = [start * self._page for start in allocation.starts]
        placed = zip(image.plan.chunks, places, strict=True)
        for shift, stretch in groupby(placed, key=lambda one: one[1] - one[0][0]):
            chunks = [chunk for chunk, _ in stretch]
            start, end = chunks[0][0], chunks[-1][1]
            yield self._slab[start + shift : end + shift], image.bytes[start:end]
        base = self._slab.data_ptr()
        row = self._rows[seat_id]
        row.copy_(torch.from_numpy(image.plan.entries([base + place for place in places])))
        yield self.table[seat_id], row
        self._arrange(self.table[seat_id])
