"""When devices should hold off with telemetry, and for how long: a pure rule over how long what they sent has waited.

The broker takes off from a message's expiry the seconds for which it had to keep it (MQTT 5, 3.3.2.3.3). Batches that
waited there are behind a queue that the hub does not see. As long as this is so for more than half of the devices, all
are asked to spread what they send; one device that says something else of its messages moves nobody.
"""

from __future__ import annotations

from appliance.core.fleet import BATCH_EXPIRY_S

CALM_S = 5.0
"""So long a batch may wait before it is a sign of a queue; a moment's burst passes by itself."""
SPREAD = 2.0
"""Times the wait over which the devices spread."""
MOST_S = 60.0
"""Alarms wait too."""


class Backpressure:
    """Collects signs between two words to the devices."""

    def __init__(self) -> None:
        self._waits: dict[str, float] = {}

    def note(self, device: str, expiry_s: int | None) -> None:
        """Note a device's batch that came, with what was left of its expiry."""
        waited = 0.0 if expiry_s is None else BATCH_EXPIRY_S - expiry_s
        self._waits[device] = max(waited, self._waits.get(device, 0.0))

    def take(self) -> float:
        """Return the seconds over which the devices should spread what they send, 0 for at once; begin anew."""
        waits, self._waits = sorted(self._waits.values()), {}
        if not waits:
            return 0.0
        typical = waits[(len(waits) - 1) // 2]  # of an even number the shorter one: half of them is no proof
        return min(MOST_S, SPREAD * typical) if typical > CALM_S else 0.0
