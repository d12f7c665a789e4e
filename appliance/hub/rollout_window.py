"""The hours in which devices may install, by their local time: pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

_DAY_S = 86_400
_FORM = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_FURTHEST_OFFSET_S = 15 * 3600


@dataclass(frozen=True, slots=True)
class Window:
    """From `begins` to `ends`, in seconds of the local day; a window that ends before it begins goes over midnight."""

    begins: int
    ends: int

    @property
    def length(self) -> int:
        """Return its length in seconds."""
        return (self.ends - self.begins) % _DAY_S

    def not_before(self, now: float, offset_s: float) -> float:
        """Return the time from which a device may begin, 0 if it may at once.

        Args:
            now: Unix seconds.
            offset_s: Of the device's local time from UTC in seconds; one that no place on Earth has counts as 0.
        """
        offset = offset_s if abs(offset_s) <= _FURTHEST_OFFSET_S else 0.0
        into = (now + offset - self.begins) % _DAY_S
        return 0.0 if into < self.length else now + _DAY_S - into


def parse_window(text: str) -> Window | None:
    """Return the window of a text such as `01:00-05:00`, or None if it is none."""
    match = _FORM.fullmatch(text)
    if match is None:
        return None
    hours = [int(each) for each in match.groups()]
    window = Window(hours[0] * 3600 + hours[1] * 60, hours[2] * 3600 + hours[3] * 60)
    return window if window.length else None
