"""Stand-ins that tests share: sequences from token lists, a registry without files, a clock to
turn."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from loriner.adapters.pool import Pool
from loriner.adapters.registry import Readiness
from loriner.core import Request, SamplingParams, Sequence, Turn

NO_TURN = Turn()


def make_request(
    prompt: Seq[int] = (1, 2, 3),
    *,
    request_id: str = "r",
    generation: str | None = None,
    salt: str = "",
    arrival_s: float = 0.0,
    turn: Turn = NO_TURN,
    embeds: bool = False,
    **sampling: Any,
) -> Request:
    params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **sampling})
    return Request(request_id, tuple(prompt), params, generation, salt, arrival_s, turn, embeds)


def make_sequence(prompt: Seq[int] = (1, 2, 3), *, index: int = 0, **request: Any) -> Sequence:
    return Sequence(make_request(prompt, **request), index, seed=7)


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeRegistry:
    """Seats without weights: `max_seats` generations at once; `loading` ones are not there yet."""

    def __init__(self, max_seats: int = 8) -> None:
        self.pool = FakePool(max_seats)
        self.loading: set[str] = set()
        self.failures: dict[str, Exception] = {}

    def tier(self, generation: str) -> str:
        return "gpu"

    def prefetch(self, generation: str) -> None:
        pass

    def want(self, generation: str) -> Readiness:
        if generation in self.failures:
            return Readiness.FAILED
        if generation in self.loading:
            return Readiness.LOADING
        return Readiness.SEATED if self.pool.try_seat(generation) else Readiness.NO_SEAT

    def take_failure(self, generation: str) -> Exception:
        return self.failures.pop(generation)


class FakePool(Pool):
    """Pins by generation; no bytes."""

    def __init__(self, max_seats: int) -> None:
        super().__init__(0, max_seats)
        self.pins: dict[str, int] = {}

    def try_seat(self, generation: str) -> bool:
        used = {g for g, count in self.pins.items() if count}
        return generation in used or len(used) < self.max_seats

    def acquire(self, generation: str) -> None:
        self.pins[generation] = self.pins.get(generation, 0) + 1

    def release(self, generation: str) -> None:
        self.pins[generation] -= 1
