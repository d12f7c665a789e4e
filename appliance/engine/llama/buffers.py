"""Memory for parked states: one mapping for all of them, whose pages are used again and again.

A fresh array of a state's size costs more in page faults than the copy that fills it. Here only the first use of a page
does, and huge pages make even that rare.

    0                               cap                            2 × cap
    ├── taken ──┼─ free ─┼── taken ──┼── taken ──┼───── free ────────┤
      pages stay when a state goes      they are given to the system

Pages that were never used take no memory. Addresses beyond the cap are for a state that comes before another has made
way for it.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np

from appliance.core.errors import EngineError
from appliance.engine.llama.context import State
from appliance.engine.llama.ranges import RangeAllocator

_MAP_NORESERVE = 0x4000
"""Linux's flag for addresses that the system need not have memory for; Python 3.11 has no name for it."""


class StateMemory:
    """Hands out memory for states; keeps at most about a cap of what it is given back."""

    def __init__(self, cap: int) -> None:
        """Reserve addresses for states of `cap` bytes in all; memory is taken as they are used.

        Raises:
            EngineError: There are not so many.
        """
        self._cap = cap - cap % mmap.PAGESIZE
        self._mapping = _reserve(2 * self._cap) if self._cap else None
        self._bytes: State = np.empty(0, np.uint8) if self._mapping is None else np.frombuffer(self._mapping, np.uint8)
        self._ranges = RangeAllocator(len(self._bytes), granularity=mmap.PAGESIZE)

    def take(self, size: int) -> State:
        """Return memory of shape (size,) that holds anything."""
        start = self._ranges.take(size) if size else None
        if start is None:  # no range is long enough
            return np.empty(size, np.uint8)
        return self._bytes[start : start + size]

    def give_back(self, payload: State, *, keep: bool = True) -> None:
        """Take back what `take` returned, whole; other memory is left alone. Who still looks at it sees others' states.

        Args:
            payload: What `take` returned.
            keep: Keep its pages, which makes their next use cheap; otherwise the system gets them.

        Raises:
            KeyError: It was given back before.
        """
        start = payload.ctypes.data - self._bytes.ctypes.data
        if self._mapping is None or not 0 <= start < len(self._bytes):
            return
        self._ranges.give_back(start)
        beyond = max(start, self._cap) if keep else start
        end = start + len(payload)
        if beyond < end:
            self._mapping.madvise(mmap.MADV_DONTNEED, beyond, end - beyond)

    def check_integrity(self) -> None:
        """Verify the books.

        Raises:
            AssertionError: Ranges overlap, or some are lost.
        """
        self._ranges.check_integrity()


def _reserve(size: int) -> mmap.mmap:
    """Return zeroed memory, of which no page exists before it is used."""
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"There are not {size // 2:,} bytes of memory to park conversations in.",
            advice="Lower `parking_ram_bytes`.",
            code="not_enough_memory",
        ) from error
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
