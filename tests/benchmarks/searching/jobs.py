"""What a contestant is told to do in a process of its own, and what it answers. Needs msgspec and NumPy alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

RowT = TypeVar("RowT")
FoundT = TypeVar("FoundT")


Kind = Literal["fill", "keywords", "vectors", "merge", "search"]
"""Store the corpus; make the index of words, or of vectors; make the latter's next generation; search."""


class Job(msgspec.Struct, frozen=True):
    """One step with a corpus, in a folder of the contestant's."""

    kind: Kind
    corpus: str
    home: str
    count: int
    queries: int


class Memory(msgspec.Struct, frozen=True):
    """Resident bytes of this process, mapped files included: now, and at most so far."""

    now: int
    peak: int


class Made(msgspec.Struct, frozen=True):
    """How long it took, and the most bytes that were resident."""

    seconds: float
    peak: int


class Times(msgspec.Struct, frozen=True):
    """Seconds of each query, and CPU seconds of this process meanwhile."""

    wall: list[float]
    cpu: list[float]


class Searched(msgspec.Struct, frozen=True):
    """What searching took, query by query.

    Attributes:
        start_s: Until the first query was answered, by both legs where there are two.
        hybrid: By both legs, with passages.
        dense: The nearest vectors alone.
        effort: How hard it had to search for its recall, where that can be chosen; ours chooses by itself.
    """

    start_s: float
    dense: Times
    dense_filtered: Times
    recall: float
    recall_filtered: float
    memory: Memory
    hybrid: Times | None = None
    filtered: Times | None = None
    effort: int = 0


def memory() -> Memory:
    """Return what this process occupies."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    now, peak = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return Memory(now, peak)


def on_one_core() -> None:
    """Stay on one core from now on, with all threads."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


class Clock:
    """Notes how long what is done in its context takes, each time."""

    def __init__(self) -> None:
        self.times = Times([], [])
        self._began = (0.0, 0.0)

    def __enter__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._began
        self.times.wall.append(time.perf_counter() - wall)
        self.times.cpu.append(time.process_time() - cpu)


def timed(find: Callable[[RowT], FoundT], rows: Iterable[RowT]) -> tuple[Times, list[FoundT]]:
    """Return how long each took, and what was found."""
    clock, answers = Clock(), []
    for row in rows:
        with clock:
            found = find(row)
        answers.append(found)
    return clock.times, answers
