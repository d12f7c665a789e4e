"""How many blocks may be outstanding: as many as fill the link, and little more, for commands wait in the same queue.

What the way takes by itself is `base`, the mean round trip of blocks when no queue is ours. Rounds are compared with
it: a window of `(base + q) / mean` of the one that gave `mean` leaves a queue of `q` seconds, and each round goes half
way there, as in FAST TCP (Wei et al., 2006). The contract shrinks the window when the round trip has grown by more than
500 ms; steering there only would swing around that, so `q` is 100 ms. Means, because a block that was sent again on the
way is no queue, and neither is it the rule.

What waits behind a lost segment arrives in one heap. Were asking only an answer to what comes, the link would run dry
before each heap and have a queue after it: on 2 MB/s, 100 ms and 2 % loss 80 % of it would be used at a command's round
trip of 0.28 s, or 85 % at 0.46 s. So while nothing comes, what is due by now is taken as come, up to `AHEAD` of the
window: 87 to 90 % at 0.29 s.

    starting ──a queue──> steering ──10 s, or late though smaller──> draining ──a round──> looking ──a round──> steering

To look is to ask for so little that nothing of ours can wait: what blocks take then is the new `base`. So a busy broker
or another network is not taken for a queue of ours, which a smaller window would not shorten.

A careful window is for a download that was interrupted, for it may be again, and then what is on its way is lost: it is
never larger than the first one and a 64th of what has come since. A box that is killed again and again loses 1.6 % and
128 KiB each time; one that lives has a window of 640 KiB after 32 MiB.
"""

from __future__ import annotations

import math
from enum import Enum

QUEUE_S = 0.1
"""What may wait before the link on our account."""

BASE_COUNTS_S = 10.0
BASE_COUNTS_TRIPS = 20
"""A look costs about a round trip, so it is not taken more often than that."""

LATE_S = 0.15
LATE_ROUNDS = 3
LATE_AFTER_S = 2.0
"""Blocks that take so much longer than they should, for so many rounds, so long after a look, make another one due."""

LEAST_BLOCKS = 2
CAREFUL_SHARE = 1 / 64

AHEAD = 0.4
"""More keeps the link fuller still, and makes a command wait longer when a heap comes after all."""

_GROWTH = 1.5
_DRAINED = 0.75
_CLOCK_S = 1e-3


class _Phase(Enum):
    STARTING = "starting"
    STEERING = "steering"
    DRAINING = "draining"
    LOOKING = "looking"


class WindowSize:
    """The size of one connection's window, from the round trips of its blocks. Times are of any clock."""

    def __init__(self, first: float, most: float, *, careful: bool) -> None:
        """Begin small.

        Args:
            first: Blocks at first.
            most: Blocks at most.
            careful: Whether what is on its way may be lost.
        """
        self._blocks = first
        self._first = first
        self._most = most
        self._careful = careful
        self._phase = _Phase.STARTING
        self._came = 0
        self._base = 0.0
        self._base_at = 0.0
        self._round_from: float | None = None
        self._took: list[float] = []
        self._mean = _CLOCK_S
        self._was_full = False
        self._late_rounds = 0
        self._before_look = 0.0

    @property
    def blocks(self) -> int:
        """Return how many may be outstanding while they come as they should."""
        return int(self._blocks)

    def ahead(self, silence_s: float) -> int:
        """Return how many more may be outstanding when none has come for so long."""
        return int(max(0.0, min(silence_s * self._blocks / self._mean - 1, self._most_ahead)))

    def silence_s(self, ahead: int) -> float:
        """Return how long none has to come for so many more to be outstanding, infinite if they never may."""
        return math.inf if ahead > self._most_ahead else (ahead + 1) * self._mean / self._blocks

    def filled(self) -> None:
        """Take note that as many are outstanding as may be; else nothing says that more would do."""
        self._was_full = True

    def came(self) -> None:
        """Take note of a block."""
        self._came += 1

    def took(self, asked_at: float, now: float) -> None:
        """Take note of how long a block took that was asked for once."""
        took = now - asked_at
        if self._round_from is None:
            self._base, self._base_at = took, now
            self._round_from = now
        elif asked_at >= self._round_from:  # asked for after the round began: a round trip has passed
            self._end_round(sum(self._took) / len(self._took), now)
            self._took.clear()
            self._round_from = now
        self._took.append(took)

    def halve(self) -> None:
        """Blocks were lost."""
        self._blocks = max(1.0, self._blocks / 2)
        self._before_look = max(1.0, self._before_look / 2)

    def _end_round(self, mean: float, now: float) -> None:
        self._mean = max(mean, _CLOCK_S)
        if mean < self._base:
            self._base += (mean - self._base) / 4
        if self._phase is _Phase.DRAINING:
            self._phase = _Phase.LOOKING
        elif self._phase is _Phase.LOOKING:
            self._end_look(mean, now)
        elif self._is_look_due(mean, now - self._base_at):
            self._begin_look()
        else:
            self._steer(mean)
        self._was_full = False

    def _is_look_due(self, mean: float, age: float) -> bool:
        self._late_rounds = self._late_rounds + 1 if mean > self._base + LATE_S else 0
        if age > max(BASE_COUNTS_S, BASE_COUNTS_TRIPS * self._base):
            return True
        return self._late_rounds > LATE_ROUNDS and age > LATE_AFTER_S and self._blocks > LEAST_BLOCKS

    def _begin_look(self) -> None:
        self._phase = _Phase.DRAINING
        self._late_rounds = 0
        self._before_look = self._blocks
        self._blocks = max(1.0, _DRAINED * self._blocks * self._base / (self._base + QUEUE_S))

    def _end_look(self, mean: float, now: float) -> None:
        grown = (mean + QUEUE_S) / (self._base + QUEUE_S)
        self._phase = _Phase.STEERING
        self._base, self._base_at = mean, now
        self._set(self._before_look * min(2.0, max(1.0, grown)))

    def _steer(self, mean: float) -> None:
        if self._phase is _Phase.STARTING and mean < self._base + QUEUE_S / 2:
            self._base = max(self._base, (self._base + mean) / 2)
            factor = _GROWTH
        else:
            self._phase = _Phase.STEERING
            factor = min(1.25, max(0.6, (1 + (self._base + QUEUE_S) / self._mean) / 2))
        if factor <= 1 or self._was_full:
            self._set(factor * self._blocks)

    @property
    def _most_now(self) -> float:
        return min(self._most, self._first + self._came * CAREFUL_SHARE) if self._careful else self._most

    @property
    def _most_ahead(self) -> float:
        return min(AHEAD * self._blocks, self._most_now - self._blocks) if self._phase is _Phase.STEERING else 0.0

    def _set(self, blocks: float) -> None:
        self._blocks = max(float(LEAST_BLOCKS), min(blocks, self._most_now))
