"""Which items are evaluated together: the policy of a session's batches, as a pure state machine.

A batch closes at a number of rows, or at a number of tokens *with padding*: its longest row times its rows. What waits
is batched at once, nothing is ever held back for company.

The jobs take turns to lead. The leader's longest item begins the batch; then the other jobs, of one priority those with
the nearest lengths first, add the item that is nearest to it in length, an item each and round again, as long as it
fits and lengths stay near enough that little is padded. Whoever got nothing in comes before all who did. So the items
of one large job are packed in order of length, a job of thousands holds up none of one, and nobody starves: of its own
priority a job waits for at most one batch of each job that was there before it, and time lifts its priority.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

from appliance.core.types import Priority
from appliance.engine.onnx.work import Item

AGEING_S = 5.0
"""Waiting so long lifts a job by one priority."""
SLACK_TOKENS = 16
"""Rows of a batch differ in length by up to this and a quarter: about what a batch of its own costs beside its rows."""
SLACK_SHARE = 4


@dataclass(frozen=True, slots=True)
class Place:
    """An item by its job and its index there."""

    job: int
    index: int


@dataclass(slots=True)
class _Job:
    """A job that waits.

    Attributes:
        turn: Of two jobs of one priority the one with the lower number comes first.
        since: When it came, or got something into a batch.
        rows: How many still wait.
        groups: What still waits: lengths with indices, in order, by what may share a batch.
    """

    items: Sequence[Item]
    priority: Priority
    deadline: float
    turn: int
    since: float
    rows: int
    groups: dict[Hashable, list[tuple[int, int]]]

    def tier(self, now: float) -> int:
        """Return the priority that waiting has given it."""
        return max(0, self.priority - int((now - self.since) / AGEING_S))


class _Frame:
    """The batch as it grows."""

    def __init__(self, rows: float, tokens: float) -> None:
        self._most_rows, self._most_tokens = rows, tokens
        self.rows = self.longest = self.shortest = 0

    def fits(self, item: Item) -> bool:
        """Return True if the batch, which has an item, may have that one too."""
        rows = self.rows + item.rows
        longest, shortest = max(self.longest, item.length), min(self.shortest, item.length)
        if longest - shortest > SLACK_TOKENS + longest // SLACK_SHARE:
            return False
        return rows <= self._most_rows and rows * longest <= self._most_tokens

    def add(self, item: Item) -> None:
        self.shortest = min(self.shortest, item.length) if self.rows else item.length
        self.longest = max(self.longest, item.length)
        self.rows += item.rows


class Batcher:
    """The items that wait."""

    def __init__(self, *, rows: int, tokens: int) -> None:
        """Close batches at so many rows, or tokens with padding. An item that is over it alone runs alone."""
        self._rows, self._tokens = rows, tokens
        self._jobs: dict[int, _Job] = {}
        self._turns = 0

    @property
    def idle(self) -> bool:
        """Return True when nothing waits."""
        return not self._jobs

    @property
    def rows(self) -> int:
        """Return how many rows wait."""
        return sum(job.rows for job in self._jobs.values())

    def submit(
        self,
        job: int,
        items: Sequence[Item],
        *,
        kind: Hashable = None,
        priority: Priority = Priority.DEFAULT,
        now: float = 0.0,
        deadline: float = math.inf,
    ) -> None:
        """Queue a job, which must have items, and no job twice at a time.

        Args:
            job: Its number.
            items: Of one row or more each.
            kind: Only items of jobs of one kind share a batch.
            priority: Who comes first.
            now: The time, in seconds.
            deadline: From when on it is not wanted any more.
        """
        assert items, "a job has items"
        assert job not in self._jobs, "a job is queued once"
        groups: dict[Hashable, list[tuple[int, int]]] = {}
        for index, item in enumerate(items):
            groups.setdefault(None if item.key is None else (kind, item.key), []).append((item.length, index))
        for group in groups.values():
            group.sort()
        rows = sum(each.rows for each in items)
        self._jobs[job] = _Job(items, priority, deadline, self._next_turn(), now, rows, groups)

    def cancel(self, job: int) -> None:
        """Forget what waits of a job. Idempotent."""
        self._jobs.pop(job, None)

    def expire(self, now: float) -> list[int]:
        """Forget the jobs whose deadline has come, and return them."""
        expired = [number for number, job in self._jobs.items() if job.deadline <= now]
        for number in expired:
            del self._jobs[number]
        return expired

    def next_batch(self, now: float = 0.0, most_rows: float = math.inf) -> list[Place]:
        """Take the next items to evaluate together; empty only when nothing waits.

        Args:
            now: The time, in seconds.
            most_rows: Close the batch at so many rows, if it would not close before.
        """
        if not self._jobs:
            return []
        turns = sorted(self._jobs, key=lambda number: (self._jobs[number].tier(now), self._jobs[number].turn))
        key = next(iter(self._jobs[turns[0]].groups))
        frame = _Frame(min(self._rows, most_rows), self._tokens)
        batch = [self._lead(turns[0], key, frame)]
        if key is not None:
            turns = [*sorted(turns[1:], key=partial(self._nearness, key=key, length=frame.longest, now=now)), turns[0]]
            while turns:
                added = [place for number in turns if (place := self._add(number, key, frame))]
                batch += added
                turns = [place.job for place in added if key in self._jobs[place.job].groups]
        for number in dict.fromkeys(place.job for place in batch):
            self._note_served(number, now)
        return batch

    def _nearness(self, number: int, *, key: Hashable, length: int, now: float) -> tuple[int, int, int]:
        """Return what sorts the jobs that join a batch: priority, how near their items are in length, and turn."""
        job = self._jobs[number]
        group = job.groups.get(key, ())
        above = bisect_right(group, (length, len(job.items)))
        near = [abs(group[each][0] - length) for each in (above - 1, above) if 0 <= each < len(group)]
        return job.tier(now), min(near, default=0), job.turn

    def _lead(self, number: int, key: Hashable, frame: _Frame) -> Place:
        return self._take(number, key, -1, frame)

    def _add(self, number: int, key: Hashable, frame: _Frame) -> Place | None:
        """Take the job's item that is nearest in length: the longest that needs no more padding, or the next longer."""
        job = self._jobs[number]
        group = job.groups.get(key, ())
        above = bisect_right(group, (frame.longest, len(job.items)))
        for position in (above - 1, above):
            if 0 <= position < len(group) and frame.fits(job.items[group[position][1]]):
                return self._take(number, key, position, frame)
        return None

    def _take(self, number: int, key: Hashable, position: int, frame: _Frame) -> Place:
        job = self._jobs[number]
        group = job.groups[key]
        _, index = group.pop(position)
        if not group:
            del job.groups[key]
        frame.add(job.items[index])
        job.rows -= job.items[index].rows
        return Place(number, index)

    def _note_served(self, number: int, now: float) -> None:
        job = self._jobs[number]
        job.turn, job.since = self._next_turn(), now
        if not job.groups:
            del self._jobs[number]

    def _next_turn(self) -> int:
        self._turns += 1
        return self._turns
