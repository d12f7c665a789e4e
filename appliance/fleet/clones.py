"""Whether another box uses this one's identity: the broker lets each push the other off, for ever.

Pure: the caller tells the time. A box that was pushed off comes back after a moment, which pushes the other off, which
comes back. Neither can tell which of the two is meant to be; both notice, slow down and raise an alarm, and the hub
sees two instances, or an epoch that jumps to and fro.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WITHIN_S = 600.0
SUSPICIOUS = 3
"""Taken over this often within that time is no reconnect of one's own that the broker mistook."""
HOLD_OFF_S = 300.0


@dataclass(slots=True)
class CloneWatch:
    """Counts how often a session was taken over."""

    _taken_over: deque[float] = field(default_factory=lambda: deque(maxlen=SUSPICIOUS))

    def taken_over(self, now: float) -> bool:
        """Note that the broker gave this session to another connection with the same identity.

        Args:
            now: Seconds by a clock that never goes back.

        Returns:
            True if a clone is to be suspected: wait `HOLD_OFF_S` before coming back.
        """
        self._taken_over.append(now)
        return len(self._taken_over) == SUSPICIOUS and now - self._taken_over[0] <= WITHIN_S
