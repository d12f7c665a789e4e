"""How often each device may ask: a bucket of tokens each. Pure: the caller tells the time."""

from __future__ import annotations

DEVICES_REMEMBERED = 20_000
BURST_S = 10.0
"""A device that was quiet may ask at once as often as else in this time."""


class Rates:
    """Buckets that fill evenly; who takes from an empty one is told how long to wait."""

    def __init__(self, most_a_minute: int) -> None:
        """Let each device ask so often in a minute."""
        self._each_s = 60.0 / most_a_minute
        self._burst_s = max(BURST_S, self._each_s)
        self._full_at: dict[str, float] = {}

    def take(self, device: str, now: float) -> float:
        """Take one token.

        Args:
            device: Whose.
            now: Seconds by a clock that never goes back.

        Returns:
            0, or the seconds until there is one.
        """
        # A bucket is kept as the time when it will be full again, so that a full one need not be kept at all.
        full_at = max(self._full_at.get(device, now), now)
        wait_s = full_at + self._each_s - now - self._burst_s
        if wait_s > 1e-9:
            return wait_s
        if len(self._full_at) >= DEVICES_REMEMBERED:
            self._full_at = {each: at for each, at in self._full_at.items() if at > now}
        self._full_at[device] = full_at + self._each_s
        return 0.0
