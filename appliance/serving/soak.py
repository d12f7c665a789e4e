"""Whether a version on trial has proven itself: its errors, its pace and the memory it leaves. Policy only.

A few requests prove nothing: one that fails among three is no rate, and two slow ones are no 95th percentile. So a
trial ends early only on what cannot be chance, and is judged by all there is once its time is over. Whether the hub can
be reached says nothing of a model and is not asked.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from appliance.core.errors import EngineError
from appliance.core.releases import Criteria
from appliance.core.wishes import Soak

LEAST_ERRORS = 3
"""So many failed requests end a trial before its time, if they are too large a share."""
LEAST_PACES = 20
"""Requests of either version without which their paces are not compared."""
KEPT_PACES = 400
SCARCE_SHARE = 0.02
"""Share of the memory that must stay free."""

Outcome = Literal["goes_on", "confirmed", "rolled_back"]


@dataclass(slots=True)
class Record:
    """What became of a loaded version's requests.

    Attributes:
        requests: Those that ended by themselves, well or not.
        errors: Those that the engine failed.
        paces: Seconds a token of the newest that ended well, or seconds a request where no text is written.
    """

    requests: int = 0
    errors: int = 0
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_PACES))

    def served(self, pace: float | None) -> None:
        """Count a request that ended well; None if it says nothing of the pace."""
        self.requests += 1
        if pace is not None:
            self.paces.append(pace)

    def failed(self) -> None:
        """Count a request that the engine failed."""
        self.requests += 1
        self.errors += 1

    @property
    def slowest(self) -> float:
        """Return the 95th percentile of the paces, or 0 where they are too few to tell."""
        return percentile(self.paces) if len(self.paces) >= LEAST_PACES else 0.0


@contextmanager
def recorded(record: Record, now: Callable[[], float]) -> Iterator[None]:
    """Count what is done inside as one request; one that is refused or given up says nothing.

    Args:
        record: Where to count.
        now: Seconds, from whatever start.
    """
    began = now()
    try:
        yield
    except EngineError:
        record.failed()
        raise
    record.served(now() - began)


@dataclass(frozen=True, slots=True)
class Observed:
    """A trial so far.

    Attributes:
        elapsed_s: Since the version answers.
        wished_s: Since it was wished for, as far as this process knows.
        requests: See `Record`.
        errors: See `Record`.
        slowest: See `Record`.
        baseline: The same of the version before, 0 where that is not known.
        available: Bytes of memory that are free.
        total: Bytes of memory there are.
        was_scarce: Memory was short before this version was loaded.
        taken: Bytes of memory that the version has taken, see `Footprint`.
    """

    elapsed_s: float
    wished_s: float
    requests: int
    errors: int
    slowest: float
    baseline: float
    available: int
    total: int
    was_scarce: bool = False
    taken: int = 0


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a version has taken of the memory of a process that it shares with others.

    Attributes:
        taken: Bytes by which the process grew since the trial began, without what others' loading and going changed.
        resident: Bytes of the process at the last look.
        others: What else was loaded then.
    """

    taken: int
    resident: int
    others: frozenset[str]


def looked(before: Footprint, resident: int, others: frozenset[str], *, others_load: bool) -> Footprint:
    """Return the footprint after one more look; growth while something else comes or goes is not held against it."""
    is_its_own = not others_load and others == before.others
    grown = resident - before.resident if is_its_own else 0
    return Footprint(max(0, before.taken + grown), resident, others)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a trial comes to; `code` and `reason` say why it was rolled back."""

    outcome: Outcome
    code: str = ""
    reason: str = ""


def percentile(values: Sequence[float]) -> float:
    """Return the 95th percentile by the nearest rank.

    Args:
        values: At least one.
    """
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def is_scarce(available: int, total: int) -> bool:
    """Return True if so little memory is free that the box is in danger."""
    return available < SCARCE_SHARE * total


def judge(soak: Soak, criteria: Criteria, seen: Observed) -> Verdict:
    """Return whether a trial goes on, went well or is to be rolled back."""
    is_over = seen.wished_s >= soak.at_most_s or (seen.elapsed_s >= soak.seconds and seen.requests >= soak.requests)
    if is_scarce(seen.available, seen.total) and not seen.was_scarce:
        return Verdict(
            "rolled_back",
            "soak_memory",
            f"{seen.available / 2**20:.0f} of {seen.total / 2**20:.0f} MiB of memory were free, "
            f"and at least {SCARCE_SHARE:.0%} must be.",
        )
    if 0 < criteria.most_memory < seen.taken:
        return Verdict(
            "rolled_back",
            "soak_over_budget",
            f"It has taken {seen.taken / 2**20:.0f} MiB of memory, and at most {criteria.most_memory / 2**20:.0f} are "
            "allowed.",
        )
    rate = seen.errors / max(1, seen.requests)
    if rate > criteria.most_error_rate and (is_over or seen.errors >= LEAST_ERRORS):
        return Verdict(
            "rolled_back",
            "soak_errors",
            f"{seen.errors} of {seen.requests} requests failed, and at most {criteria.most_error_rate:.0%} may.",
        )
    limit = criteria.most_latency_ratio * seen.baseline
    if limit > 0 and seen.slowest > limit:
        return Verdict(
            "rolled_back",
            "soak_latency",
            f"Its 95th percentile is {seen.slowest * 1000:.1f} ms, that of the version before "
            f"{seen.baseline * 1000:.1f} ms, and at most {criteria.most_latency_ratio:g} times as much may be.",
        )
    return Verdict("confirmed" if is_over else "goes_on")
