"""Which blocks to ask the hub for, and when.

    wanted ──ask──> outstanding ──arrived──> done
       ^                │
       └── late: max(2 s, 4 x smoothed round trip), or the connection broke

How many may be outstanding is `fleet.window_size`'s to say.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from appliance.core.fleet import BLOCK_BYTES
from appliance.fleet.window_size import WindowSize

FIRST_BYTES = 128 * 1024
LARGEST_BYTES = 4 * 1024 * 1024
LEAST_PATIENCE_S = 2.0
LONGEST_PATIENCE_S = 60.0
BATCHES = 8
"""Requests that a window is asked for with: few of several blocks rather than one for each."""

BLOCKS_A_REQUEST = 128
"""Bits of `BlockRequest.missing`."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: `blocks` in order, the last less than `BLOCKS_A_REQUEST` from the first."""

    blocks: tuple[int, ...]

    @property
    def first(self) -> int:
        """Return the index that bit 0 speaks of."""
        return self.blocks[0]

    @property
    def missing(self) -> bytes:
        """Return the bits, as few bytes as will do."""
        bits = bytearray((self.blocks[-1] - self.first) // 8 + 1)
        for block in self.blocks:
            bits[(block - self.first) // 8] |= 1 << (block - self.first) % 8
        return bytes(bits)


@dataclass(slots=True)
class _Asked:
    """When a block was asked for, and whether for the first time."""

    at: float
    again: bool


class Window:
    """The blocks of one download that are still to come. Times are seconds of any clock that never goes back."""

    def __init__(self, wanted: Iterable[int], *, first_bytes: int = FIRST_BYTES, careful: bool = False) -> None:
        """Ask for nothing yet.

        Args:
            wanted: Indexes of the blocks.
            first_bytes: How much may be outstanding at first.
            careful: Whether the download was interrupted before, and so may be again.
        """
        self._wanted = deque(sorted(wanted))
        self._asked: dict[int, _Asked] = {}
        self._repeated: set[int] = set()
        self._size = _first_size(first_bytes, careful=careful)
        self._smoothed: float | None = None
        self._came_at = 0.0
        self._shrunk_at = float("-inf")

    @property
    def size_bytes(self) -> int:
        """Return how much may be outstanding while blocks come as they should."""
        return self._size.blocks * BLOCK_BYTES

    @property
    def outstanding(self) -> int:
        """Return how many blocks were asked for and have not come."""
        return len(self._asked)

    @property
    def done(self) -> bool:
        """Tell whether everything has come."""
        return not self._wanted and not self._asked

    @property
    def patience_s(self) -> float:
        """Return how long a block is waited for before it is asked for again."""
        return min(LONGEST_PATIENCE_S, max(LEAST_PATIENCE_S, 4 * (self._smoothed or 0.0)))

    def ask(self, now: float, at_most: int = LARGEST_BYTES // BLOCK_BYTES) -> list[Ask]:
        """Return what to ask for now, and take it as asked for.

        Args:
            now: The time.
            at_most: Blocks that a cap of the bandwidth allows.
        """
        self._expire(now)
        free = self._size.blocks + self._size.ahead(now - self._came_at) - len(self._asked)
        room = min(free, at_most, len(self._wanted))
        if room < 1 or (self._asked and room < self._batch):
            return []
        if room == free:
            self._size.filled()
        taken = sorted(self._wanted.popleft() for _ in range(room))
        for block in taken:
            self._asked[block] = _Asked(now, again=block in self._repeated)
        return _requests(taken)

    @property
    def _batch(self) -> int:
        return min(max(1, self._size.blocks // BATCHES), len(self._wanted))

    def ask_at(self) -> float:
        """Return when to ask though nothing comes, infinite for never."""
        if not self._wanted:
            return math.inf
        return self._came_at + self._size.silence_s(len(self._asked) + self._batch - self._size.blocks)

    def arrived(self, block: int, now: float) -> bool:
        """Take note of a block; False if nobody waits for it, for then it is a repetition or was never asked for."""
        asked = self._asked.pop(block, None)
        if asked is None:
            return self._late(block)
        self._size.came()
        self._came_at = now
        if not asked.again:  # else it is not known which request this answers
            took = now - asked.at
            self._smoothed = took if self._smoothed is None else self._smoothed + (took - self._smoothed) / 8
            self._size.took(asked.at, now)
        return True

    def put_back(self, blocks: Iterable[int]) -> None:
        """Want blocks again, before the others: what came was not what was due."""
        self._return(blocks)

    def disconnected(self) -> None:
        """Want again what was outstanding, and find the size of the window anew: the next link may be another."""
        self._return(self._asked)
        self._asked.clear()
        self._size = _first_size(FIRST_BYTES, careful=True)
        self._smoothed = None

    def next_expiry(self) -> float | None:
        """Return when the oldest outstanding block is late, or None if nothing is outstanding."""
        return min((each.at for each in self._asked.values()), default=None)

    def _late(self, block: int) -> bool:
        """Take a block that was given up already and has not been asked for again."""
        if block not in self._repeated or block not in self._wanted:
            return False
        self._wanted.remove(block)
        return True

    def _expire(self, now: float) -> None:
        late = [block for block, asked in self._asked.items() if now - asked.at >= self.patience_s]
        if not late:
            return
        for block in late:
            del self._asked[block]
        self._return(late)
        if now - self._shrunk_at >= self.patience_s:  # once for all that were lost together
            self._shrunk_at = now
            self._size.halve()

    def _return(self, blocks: Iterable[int]) -> None:
        returned = sorted(blocks, reverse=True)
        self._wanted.extendleft(returned)
        self._repeated.update(returned)


class Pace:
    """A cap of the bandwidth: a bucket that fills with `bytes_per_s`, 0 for no cap, and holds one second's worth."""

    def __init__(self, bytes_per_s: int, now: float) -> None:
        self._rate = bytes_per_s
        self._most = float(max(bytes_per_s, BLOCK_BYTES))
        self._there = self._most
        self._at = now

    def blocks(self, now: float) -> int:
        """Return how many blocks may be taken now."""
        if not self._rate:
            return LARGEST_BYTES // BLOCK_BYTES
        self._there = min(self._most, self._there + (now - self._at) * self._rate)
        self._at = now
        return int(self._there // BLOCK_BYTES)

    def take(self, blocks: int) -> None:
        """Take so many out."""
        self._there -= blocks * BLOCK_BYTES if self._rate else 0

    def wait_s(self) -> float:
        """Return the seconds until there is one block, 0 if there is one or no cap."""
        return max(0.0, (BLOCK_BYTES - self._there) / self._rate) if self._rate else 0.0


def _first_size(first_bytes: int, *, careful: bool) -> WindowSize:
    return WindowSize(first_bytes / BLOCK_BYTES, LARGEST_BYTES / BLOCK_BYTES, careful=careful)


def _requests(blocks: list[int]) -> list[Ask]:
    requests: list[Ask] = []
    begin = 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or blocks[end] - blocks[begin] >= BLOCKS_A_REQUEST:
            requests.append(Ask(tuple(blocks[begin:end])))
            begin = end
    return requests
