"""When which batch of telemetry may go: a window of what the hub has not acknowledged, and a bounded rate of history.

    live      what came since the connecting, the newest health, every alarm and job: at once, in a window of its own
    history   the rest: at most `history_rate` bytes a second, a few batches under way, so that live goes between

A batch that is not acknowledged goes again, each time after twice as long.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from appliance.core.fleet import Stream

LIVE_ORDER: tuple[Stream, ...] = ("health", "alarm", "job", "metric", "sample")
HISTORY_ORDER: tuple[Stream, ...] = ("health", "metric", "sample")
"""Alarms and jobs are always live."""


@dataclass(frozen=True, slots=True)
class PaceLimits:
    """How much may be under way.

    Attributes:
        live_window: Live batches that are not acknowledged.
        history_window: The same for history.
        history_rate: Bytes of history a second, compressed.
        shortest_wait_s: Before a batch goes again, at least.
        longest_wait_s: At most.
    """

    live_window: int = 8
    history_window: int = 4
    history_rate: float = 64 * 1024.0
    shortest_wait_s: float = 5.0
    longest_wait_s: float = 300.0


USUAL = PaceLimits()


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch under way.

    Attributes:
        stream: Its stream.
        boot: Its boot.
        first: Its first sequence.
        last: Its last one.
        size: Bytes as sent.
        live: Which window it is in.
        sent_at: When it went last.
        tries: How often it went.
    """

    stream: Stream
    boot: int
    first: int
    last: int
    size: int
    live: bool
    sent_at: float
    tries: int = 1


@dataclass(slots=True)
class Pace:
    """What is under way and what may follow. All times are seconds of one clock that never goes back.

    Attributes:
        limits: How much may be under way.
        flights: What is, by stream, boot and last sequence.
        round_trip: Smoothed seconds from sending to the acknowledgement; 0 before the first.
    """

    limits: PaceLimits = USUAL
    flights: dict[tuple[Stream, int, int], Flight] = field(default_factory=dict)
    round_trip: float = 0.0
    _budget: float = 0.0
    _counted_at: float | None = None

    def connected(self) -> None:
        """Forget what was under way: it is read anew, and the hub keeps each row only once."""
        self.flights.clear()

    def may_send(self, now: float, *, live: bool) -> bool:
        """Return whether a new batch may go."""
        under_way = sum(each.live == live for each in self.flights.values())
        if live:
            return under_way < self.limits.live_window
        self._earn(now)
        return under_way < self.limits.history_window and self._budget > 0

    def sent(self, flight: Flight) -> None:
        """Note a batch that went."""
        self.flights[flight.stream, flight.boot, flight.last] = flight
        if not flight.live:
            self._earn(flight.sent_at)
            self._budget -= flight.size

    def due(self, now: float) -> Flight | None:
        """Return the batch that should go again first, live ones before history, or None."""
        late = [each for each in self.flights.values() if self._again_at(each) <= now]
        return min(late, key=lambda each: (not each.live, each.sent_at), default=None)

    def resent(self, flight: Flight, now: float) -> None:
        """Note that a batch went again."""
        self.sent(replace(flight, sent_at=now, tries=flight.tries + 1))

    def dropped(self, flight: Flight) -> None:
        """Note that nothing of a batch is left to be sent."""
        self.flights.pop((flight.stream, flight.boot, flight.last), None)

    def acknowledged(self, stream: Stream, boot: int, last: int, now: float) -> None:
        """Note that the hub has answered a batch; the round trip is learnt from those that went once only."""
        flight = self.flights.pop((stream, boot, last), None)
        if flight is not None and flight.tries == 1:
            took = now - flight.sent_at
            self.round_trip = took if self.round_trip == 0 else 0.875 * self.round_trip + 0.125 * took

    def wait_s(self, now: float, *, history: bool) -> float | None:
        """Return the seconds after which something may be done that may not now, or None if only news can bring it.

        Args:
            now: The time.
            history: Whether there is history to send.
        """
        times = [self._again_at(each) for each in self.flights.values()]
        if history and sum(not each.live for each in self.flights.values()) < self.limits.history_window:
            self._earn(now)
            times.append(now + max(0.0, -self._budget) / self.limits.history_rate)
        return max(0.001, min(times) - now) if times else None

    def _again_at(self, flight: Flight) -> float:
        first = max(self.limits.shortest_wait_s, 4 * self.round_trip)
        return flight.sent_at + min(self.limits.longest_wait_s, first * 2.0 ** min(flight.tries - 1, 20))

    def _earn(self, now: float) -> None:
        """Add to the budget what the time since the last look is worth, at most a second's worth."""
        if self._counted_at is None:
            self._budget = self.limits.history_rate
        else:
            earned = (now - self._counted_at) * self.limits.history_rate
            self._budget = min(self.limits.history_rate, self._budget + earned)
        self._counted_at = now
