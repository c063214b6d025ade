"""Pages of one slab of memory, handed out in runs and joined again when they come back.

Knows numbers of pages, nothing of what lies in them; not thread-safe. Invariant: free and used runs
do not overlap and together are the whole slab, and no two free runs touch (`check_integrity`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """Neighbouring pages."""

    start: int
    num_pages: int


class Allocation(NamedTuple):
    """Where each chunk stands, and the runs that hold them all."""

    starts: tuple[int, ...]  # first page of each chunk, in the order they were asked for
    runs: tuple[Run, ...]


class Arena:
    """`num_pages` pages. A chunk is contiguous; the chunks of one allocation need not be."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 0
        self.num_pages = num_pages
        self.num_free = 0
        self._free = _FreeRuns()
        self._used: dict[int, int] = {}  # start -> pages
        if num_pages:
            self._free.add(0, num_pages)
            self.num_free = num_pages

    def can_allocate(self, chunks: Sequence[int]) -> bool:
        """Whether chunks of so many pages fit now."""
        return sum(chunks) <= self.num_free and self._free.fit(chunks) is not None

    def allocate(self, chunks: Sequence[int]) -> Allocation:
        """Side by side when one run holds them all, else in as few runs as a greedy fill finds."""
        runs = self._free.fit(chunks)
        assert runs is not None, "allocate without can_allocate"
        starts = [0] * len(chunks)
        taken = []
        for start, members in runs:
            end = start
            for index in members:
                starts[index] = end
                end += chunks[index]
            self._free.take(start, end - start)
            self._used[start] = end - start
            self.num_free -= end - start
            taken.append(Run(start, end - start))
        return Allocation(tuple(starts), tuple(taken))

    def free(self, allocation: Allocation) -> None:
        for start, num_pages in allocation.runs:
            assert self._used.pop(start) == num_pages
            self._free.add(start, num_pages)
            self.num_free += num_pages

    def trial(self) -> Trial:
        """What would fit if some allocations were given back; this arena stays as it is."""
        return Trial(self._free.copy())

    def check_integrity(self) -> None:
        runs = sorted([*self._free.runs(), *self._used.items()])
        position = 0
        for start, num_pages in runs:
            assert start == position and num_pages > 0, "pages overlap or are lost"
            position += num_pages
        assert position == self.num_pages
        free = sorted(self._free.runs())
        assert all(a + n < b for (a, n), (b, _) in zip(free, free[1:], strict=False))
        assert self.num_free == sum(n for _, n in free)
        self._free.check_integrity()


class Trial:
    """The free runs of an arena with some allocations given back."""

    def __init__(self, free: _FreeRuns) -> None:
        self._free = free

    def give_back(self, allocation: Allocation) -> None:
        for start, num_pages in allocation.runs:
            self._free.add(start, num_pages)

    def can_allocate(self, chunks: Sequence[int]) -> bool:
        return self._free.fit(chunks) is not None


_Fill = list[tuple[int, list[int]]]  # (first page, chunks from there on)


class _FreeRuns:
    """Free runs by start, by end and by size."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}  # start -> pages
        self._starts: dict[int, int] = {}  # end -> start
        self._by_size: list[tuple[int, int]] = []  # (pages, start), ascending

    def copy(self) -> _FreeRuns:
        other = _FreeRuns()
        other._sizes, other._starts = self._sizes.copy(), self._starts.copy()
        other._by_size = self._by_size.copy()
        return other

    def runs(self) -> list[tuple[int, int]]:
        return list(self._sizes.items())

    def add(self, start: int, num_pages: int) -> None:
        """Join it with its free neighbours."""
        end = start + num_pages
        if end in self._sizes:
            end += self._remove(end)
        if start in self._starts:
            left = self._starts[start]
            self._remove(left)
            start = left
        self._insert(start, end - start)

    def take(self, start: int, num_pages: int) -> None:
        """The first pages of a free run."""
        size = self._remove(start)
        if size > num_pages:
            self._insert(start + num_pages, size - num_pages)

    def fit(self, chunks: Sequence[int]) -> _Fill | None:
        """All in the smallest run that takes them; else in order, so that neighbours stay
        neighbours; the largest first when that fails."""
        order = list(range(len(chunks)))
        index = bisect_left(self._by_size, (sum(chunks), 0))
        if index < len(self._by_size):
            return [(self._by_size[index][1], order)]
        found = self._fill(chunks, order)
        if found is None:
            order.sort(key=lambda i: -chunks[i])
            found = self._fill(chunks, order)
        return found

    def check_integrity(self) -> None:
        assert self._by_size == sorted((n, start) for start, n in self._sizes.items())
        assert self._starts == {start + n: start for start, n in self._sizes.items()}

    def _fill(self, chunks: Sequence[int], order: Sequence[int]) -> _Fill | None:
        """Each time the smallest run that takes all that is left, or the largest there is."""
        by_size = self._by_size
        taken: set[tuple[int, int]] = set()
        filled: _Fill = []
        position, left = 0, sum(chunks)
        largest = len(by_size) - 1
        while position < len(order):
            index = bisect_left(by_size, (left, 0))
            while index < len(by_size) and by_size[index] in taken:
                index += 1
            if index >= len(by_size):
                while largest >= 0 and by_size[largest] in taken:
                    largest -= 1
                if largest < 0:
                    return None
                index = largest
            room, start = by_size[index]
            taken.add(by_size[index])
            members = []
            while position < len(order) and chunks[order[position]] <= room:
                members.append(order[position])
                room -= chunks[order[position]]
                left -= chunks[order[position]]
                position += 1
            if not members:
                return None
            filled.append((start, members))
        return filled

    def _insert(self, start: int, num_pages: int) -> None:
        self._sizes[start] = num_pages
        self._starts[start + num_pages] = start
        insort(self._by_size, (num_pages, start))

    def _remove(self, start: int) -> int:
        num_pages = self._sizes.pop(start)
        del self._starts[start + num_pages]
        del self._by_size[bisect_left(self._by_size, (num_pages, start))]
        return num_pages
