"""When an alarm is raised and when it is over: above one limit for a while, below another for a while.

A value between the two limits changes nothing. An alarm that comes and goes is held open longer each time, so that it
is told a few times and not a thousand. All times are seconds of one clock that never goes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isnan
from typing import Literal

Severity = Literal["warning", "critical"]

LONGEST_HOLD_S = 3600.0
FLAPPING_S = 1800.0
"""An alarm that is raised again within this time of its end flaps."""

NOTE_S = 86_400.0
"""How long an alarm stays open that is told of as an event."""

_MOST_NOTES = 50


@dataclass(frozen=True, slots=True)
class Rule:
    """An alarm.

    Attributes:
        name: Which.
        raise_at: The value that raises it.
        clear_at: The value that ends it, on the other side of `raise_at`; if it is above it, low values are bad.
        raise_s: How long the value must be bad.
        clear_s: How long it must be good.
        severity: How bad that is.
    """

    name: str
    raise_at: float
    clear_at: float
    raise_s: float = 0.0
    clear_s: float = 60.0
    severity: Severity = "warning"

    def bad(self, value: float) -> bool:
        """Return whether the value raises the alarm."""
        return value <= self.raise_at if self.raise_at < self.clear_at else value >= self.raise_at

    def good(self, value: float) -> bool:
        """Return whether the value ends the alarm."""
        return value >= self.clear_at if self.raise_at < self.clear_at else value <= self.clear_at


@dataclass(frozen=True, slots=True)
class Reading:
    """A value now, and the same for a person."""

    value: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class OpenOne:
    """An alarm that is open: since when by the wall clock, how bad, and what for a person."""

    since: float
    severity: Severity
    detail: str


@dataclass(frozen=True, slots=True)
class Change:
    """An alarm that was raised or is over; `value` is what did it."""

    name: str
    raised: bool
    severity: Severity
    value: float
    detail: str


@dataclass(slots=True)
class _Watch:
    bad_since: float | None = None
    good_since: float | None = None
    ended: float = float("-inf")
    flaps: int = 0
    open: bool = False


@dataclass(slots=True)
class AlarmBook:
    """The alarms of a box; it begins with none open.

    Attributes:
        rules: Which there are.
        open: Those that are open, by name.
    """

    rules: tuple[Rule, ...]
    open: dict[str, OpenOne] = field(default_factory=dict)
    _watches: dict[str, _Watch] = field(default_factory=dict)
    _notes: dict[str, float] = field(default_factory=dict)

    def observe(self, readings: Mapping[str, Reading], now: float, wall: float) -> list[Change]:
        """Take the values of now; an alarm without a value stays as it is.

        Returns:
            What changed.
        """
        changes = self._end_notes(now)
        for rule in self.rules:
            reading = readings.get(rule.name)
            if reading is None or isnan(reading.value):
                continue
            watch = self._watches.setdefault(rule.name, _Watch())
            change = self._raised(rule, watch, reading, now) or self._ended(rule, watch, reading, now)
            if change is not None:
                changes.append(change)
                self._set(change, wall)
        return changes

    def note(self, name: str, detail: str, now: float, wall: float) -> list[Change]:
        """Open a critical alarm that is an event and no value; it ends by itself when it is not told again."""
        fresh = name not in self._notes
        if fresh and len(self._notes) >= _MOST_NOTES:
            return []
        self._notes[name] = now
        if not fresh:
            return []
        change = Change(name, raised=True, severity="critical", value=1.0, detail=detail)
        self._set(change, wall)
        return [change]

    def _end_notes(self, now: float) -> list[Change]:
        over = [name for name, at in self._notes.items() if now - at >= NOTE_S]
        changes = [Change(name, raised=False, severity="critical", value=0.0, detail="") for name in over]
        for change in changes:
            del self._notes[change.name]
            self._set(change, 0.0)
        return changes

    def _raised(self, rule: Rule, watch: _Watch, reading: Reading, now: float) -> Change | None:
        if watch.open or not rule.bad(reading.value):
            watch.bad_since = None
            return None
        watch.bad_since = now if watch.bad_since is None else watch.bad_since
        if now - watch.bad_since < rule.raise_s:
            return None
        watch.flaps = watch.flaps + 1 if now - watch.ended < FLAPPING_S else 0
        watch.open, watch.bad_since, watch.good_since = True, None, None
        return Change(rule.name, raised=True, severity=rule.severity, value=reading.value, detail=reading.detail)

    def _ended(self, rule: Rule, watch: _Watch, reading: Reading, now: float) -> Change | None:
        if not watch.open or not rule.good(reading.value):
            watch.good_since = None
            return None
        watch.good_since = now if watch.good_since is None else watch.good_since
        if now - watch.good_since < min(LONGEST_HOLD_S, rule.clear_s * 2.0 ** min(watch.flaps, 20)):
            return None
        watch.open, watch.good_since, watch.ended = False, None, now
        return Change(rule.name, raised=False, severity=rule.severity, value=reading.value, detail=reading.detail)

    def _set(self, change: Change, wall: float) -> None:
        if change.raised:
            self.open[change.name] = OpenOne(wall, change.severity, change.detail)
        else:
            self.open.pop(change.name, None)
