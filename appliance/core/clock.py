"""Time, in one place, so that tests and policies can be handed another."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """What a room may ask about time."""

    def monotonic(self) -> float:
        """Return seconds from an arbitrary start; never goes back."""
        ...

    def unix(self) -> float:
        """Return seconds since 1970 by the wall clock, which may jump."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        """Return seconds from an arbitrary start; never goes back."""
        return time.monotonic()

    def unix(self) -> float:
        """Return seconds since 1970 by the wall clock, which may jump."""
        return time.time()


def iso_timestamp(unix_seconds: float) -> str:
    """Return `2026-01-31T12:00:00Z` for seconds since 1970, in UTC with second precision."""
    return datetime.fromtimestamp(unix_seconds, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
