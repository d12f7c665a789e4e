"""When to connect again: full jitter under a ceiling that doubles, so that a fleet does not come back all at once.

The rule is `uniform(0, min(300, 2^n))`, n counting the attempts since the last connection that stood for a minute; see
https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/ for why the jitter is a full one. A hold-off
that the hub asks for is waited for first, and widens the spread to its own length.
"""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_S = 300.0
STEADY_S = 60.0
"""A connection that stood so long was a good one: the next delay is a short one again."""

_LARGEST_EXPONENT = 9  # 2^9 is above the longest delay


@dataclass(frozen=True, slots=True)
class Reconnect:
    """What the delay depends on: `attempts` made since the last connection that was steady."""

    attempts: int = 0

    def after(self, connected_s: float | None) -> Reconnect:
        """Return the state after a connection that stood so long, or None if there was none: the one to wait by."""
        return Reconnect() if connected_s is not None and connected_s >= STEADY_S else self

    def again(self) -> Reconnect:
        """Return the state for the attempt that follows the wait."""
        return Reconnect(min(self.attempts + 1, _LARGEST_EXPONENT))

    @property
    def ceiling_s(self) -> float:
        """Return the longest that the delay may be, hold-off aside."""
        return min(LONGEST_S, 2.0**self.attempts)

    def delay_s(self, fraction: float, hold_off_s: float = 0.0) -> float:
        """Return the seconds to wait before the next attempt.

        Args:
            fraction: Random, from 0 to 1, evenly.
            hold_off_s: What is left of the hold-off.
        """
        hold_off_s = max(0.0, hold_off_s)
        return hold_off_s + fraction * min(LONGEST_S, max(self.ceiling_s, hold_off_s))
