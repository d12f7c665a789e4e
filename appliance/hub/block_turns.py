"""Whose block is sent next: each device in turn, one block at a time, so that a fast one does not keep others waiting.

Bounded: a device has at most one window of blocks here, what is asked for twice is there once, and what nobody can
wait for any more is dropped. Pure: the caller tells the time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

BLOCKS_A_DEVICE = 64
MOST_DEVICES = 20_000
LONGEST_S = 30.0
"""As long as the broker keeps a request."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One block for one device.

    Attributes:
        sent: From the request, for the answer.
        at: Seconds by the caller's clock when it was asked for.
    """

    device: str
    digest: str
    block: int
    sent: int
    at: float


@dataclass(slots=True)
class BlockTurns:
    """The blocks that are still to be sent."""

    _devices: OrderedDict[str, OrderedDict[tuple[str, int], Wanted]] = field(default_factory=OrderedDict)

    def add(self, device: str, digest: str, blocks: Iterable[int], sent: int, now: float) -> int:
        """Queue blocks; return how many were dropped for want of room."""
        if device not in self._devices and len(self._devices) >= MOST_DEVICES:
            return len(list(blocks))
        queue = self._devices.setdefault(device, OrderedDict())
        dropped = 0
        for block in blocks:
            if len(queue) >= BLOCKS_A_DEVICE and (digest, block) not in queue:
                dropped += 1
            else:
                queue[digest, block] = Wanted(device, digest, block, sent, now)
        if not queue:
            del self._devices[device]
        return dropped

    def take(self, now: float) -> Wanted | None:
        """Return the next block, or None if there is none."""
        while self._devices:
            device, queue = self._devices.popitem(last=False)
            _, wanted = queue.popitem(last=False)
            if queue:
                self._devices[device] = queue
            if now - wanted.at <= LONGEST_S:
                return wanted
        return None

    def forget(self, device: str, digest: str) -> None:
        """Drop a device's blocks of a file that is gone."""
        queue = self._devices.get(device)
        if queue is None:
            return
        for key in [each for each in queue if each[0] == digest]:
            del queue[key]
        if not queue:
            del self._devices[device]

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._devices.values())


def asked_for(first: int, missing: bytes) -> list[int]:
    """Return the blocks that a request's bits speak of, at most `BLOCKS_A_DEVICE`."""
    found = [first + bit for bit in range(8 * len(missing)) if missing[bit // 8] >> bit % 8 & 1]
    return found[:BLOCKS_A_DEVICE]
