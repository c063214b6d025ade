"""What a pool asks of the memory its seats lie in, and the CPU's answer.

Knows seats by number; no generations and no pins. Invariant: `used_bytes` is the sum over seats
that were placed and not cleared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol


class Weights(Protocol):
    """One generation on the host, ready for a seat."""

    @property
    def num_bytes(self) -> int: ...

    def free(self) -> None:
        """Give its memory back, when nobody reads it any more."""


class Memory(Protocol):
    """Where seats lie. Every call is quick: it runs between steps."""

    budget_bytes: int
    shares_host: bool  # whether a seat is the host's weights themselves, not a copy of them

    @property
    def used_bytes(self) -> int: ...

    def can_place(self, weights: Weights) -> bool:
        """Whether they fit now."""

    def num_victims(self, weights: Weights, seat_ids: Iterable[int]) -> int | None:
        """How many of these seats, in order, must go before they fit; None: all are too few."""

    def place(self, seat_id: int, weights: Weights) -> None:
        """Bring them to the seat; asserts that they fit."""

    def clear(self, seat_id: int) -> None:
        """Give up what `place` took."""

    def is_ready(self, seat_id: int) -> bool:
        """Whether a step that is launched now may read the seat."""

    def note_launch(self, event: Any) -> None:
        """A step was launched; `event` comes when it has read what it reads."""

    def check_integrity(self) -> None: ...

    def close(self) -> None: ...


class HostSeats:
    """Seats that are the host's weights themselves: nothing is copied."""

    shares_host = True

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._sizes: dict[int, int] = {}

    def can_place(self, weights: Weights) -> bool:
        return self.used_bytes + weights.num_bytes <= self.budget_bytes

    def num_victims(self, weights: Weights, seat_ids: Iterable[int]) -> int | None:
        excess = self.used_bytes + weights.num_bytes - self.budget_bytes
        count = 0
        for seat_id in seat_ids:
            if excess <= 0:
                break
            excess -= self._sizes[seat_id]
            count += 1
        return count if excess <= 0 else None

    def place(self, seat_id: int, weights: Weights) -> None:
        assert seat_id not in self._sizes and self.can_place(weights)
        self._sizes[seat_id] = weights.num_bytes
        self.used_bytes += weights.num_bytes

    def clear(self, seat_id: int) -> None:
        self.used_bytes -= self._sizes.pop(seat_id)

    def is_ready(self, seat_id: int) -> bool:
        return True

    def note_launch(self, event: Any) -> None:
        pass

    def check_integrity(self) -> None:
        assert self.used_bytes == sum(self._sizes.values())

    def close(self) -> None:
        pass
