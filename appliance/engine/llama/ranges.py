"""Which ranges of one large memory are taken: an allocator without the memory (pure).

    0                                                             size
    ├── taken ──┼─ free ─┼──── taken ────┼── taken ──┼──── free ───┤

First fit: the lowest free range that is long enough. What has been used before lies low, so its pages are there
already; best fit would take untouched ones.

Invariants, checked by `check_integrity`: taken and free ranges cover everything once; two free ranges never touch.
"""

from __future__ import annotations

from bisect import bisect_left


class RangeAllocator:
    """Ranges of `size` units. Each operation costs at most the number of free ranges."""

    def __init__(self, size: int, *, granularity: int = 1) -> None:
        """Start with all of it free; ranges begin, and are counted, in multiples of `granularity`."""
        self._granularity = granularity
        self._size = size - size % granularity
        self._taken: dict[int, int] = {}
        self._starts: list[int] = [0] if self._size else []  # of the free ranges, in order
        self._ends: list[int] = [self._size] if self._size else []

    @property
    def free(self) -> int:
        """Return how much is free in all ranges together."""
        return sum(self._ends) - sum(self._starts)

    def take(self, length: int) -> int | None:
        """Take a range and return where it starts, or None when no free one is long enough.

        Raises:
            ValueError: The length is not positive.
        """
        if length <= 0:
            raise ValueError(f"a range of length {length}")
        length += -length % self._granularity
        for index, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            if end - start >= length:
                self._starts[index] += length
                if end - start == length:
                    del self._starts[index], self._ends[index]
                self._taken[start] = length
                return start
        return None

    def give_back(self, start: int) -> None:
        """Free the range that starts here; it merges with its free neighbours.

        Raises:
            KeyError: No taken range starts here.
        """
        end = start + self._taken.pop(start)
        index = bisect_left(self._starts, start)
        if index < len(self._starts) and self._starts[index] == end:
            end = self._ends[index]
            del self._starts[index], self._ends[index]
        if index > 0 and self._ends[index - 1] == start:
            self._ends[index - 1] = end
        else:
            self._starts.insert(index, start)
            self._ends.insert(index, end)

    def check_integrity(self) -> None:
        """Verify the books.

        Raises:
            AssertionError: An invariant of this module's docstring does not hold.
        """
        taken = sorted((start, start + length) for start, length in self._taken.items())
        free = list(zip(self._starts, self._ends, strict=True))
        assert free == sorted(free), "free ranges out of order"
        at = 0
        for start, end in sorted(taken + free):
            assert start == at, f"a gap or an overlap at {start}"
            assert end > start, f"an empty range at {start}"
            at = end
        assert at == self._size, "a range past the end"
        assert not set(self._starts) & set(self._ends), "free ranges that touch"
