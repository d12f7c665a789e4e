"""Whether another box uses this one's identity: the broker lets each push the other off, for ever.

Pure: the caller tells the time. A box that was pushed off comes back after a moment, which pushes the other off, which
comes back. Neither can tell which of the two is meant to be; both notice, slow down and raise an alarm, and the hub
sees two instances, or an epoch that jumps to and fro. Some brokers say that a session was taken over; mosquitto 2.0
merely closes it, so a session that ends young counts too, though less: a link that drops all the time looks the same,
and is better tried seldom as well.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WITHIN_S = 600.0
YOUNG_S = 60.0
SUSPICIOUS = 6
"""Points within that time: a session that was taken over has two, one that ended young has one."""
HOLD_OFF_S = 300.0


@dataclass(slots=True)
class CloneWatch:
    """Counts the sessions that ended as they do beside a clone."""

    _points: deque[float] = field(default_factory=lambda: deque(maxlen=SUSPICIOUS))

    def ended(self, now: float, stood_s: float, *, taken_over: bool) -> bool:
        """Note that a session ended which we did not mean to end.

        Args:
            now: Seconds by a clock that never goes back.
            stood_s: How long it stood.
            taken_over: The broker says that it gave it to another connection with the same identity.

        Returns:
            True if a clone is to be suspected: wait `HOLD_OFF_S` before coming back.
        """
        points = 2 if taken_over else int(stood_s < YOUNG_S)
        self._points.extend([now] * points)
        return points > 0 and len(self._points) == SUSPICIOUS and now - self._points[0] <= WITHIN_S
