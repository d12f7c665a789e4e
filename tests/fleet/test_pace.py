from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from appliance.core.fleet import Stream
from appliance.fleet.pace import Flight, Pace, PaceLimits

LIMITS = PaceLimits(live_window=2, history_window=2, history_rate=1000.0, shortest_wait_s=5.0, longest_wait_s=60.0)


def flight(last: int, *, at: float = 0.0, live: bool = False, size: int = 100, stream: Stream = "metric") -> Flight:
    return Flight(stream, 1, last, last, size, live, at)


def test_a_full_window_waits_and_live_has_its_own() -> None:
    pace = Pace(LIMITS)
    for last in (1, 2):
        assert pace.may_send(0.0, live=False)
        pace.sent(flight(last))
    assert not pace.may_send(0.0, live=False)
    for last in (3, 4):
        assert pace.may_send(0.0, live=True)
        pace.sent(flight(last, live=True))
    assert not pace.may_send(0.0, live=True)
    pace.acknowledged("metric", 1, 1, 0.1)
    assert pace.may_send(0.1, live=False)


def test_history_keeps_to_its_rate_and_live_does_not_wait_for_it() -> None:
    pace = Pace(LIMITS)
    assert pace.may_send(0.0, live=False)
    pace.sent(flight(1, size=3000))
    pace.acknowledged("metric", 1, 1, 0.0)
    assert not pace.may_send(1.9, live=False)
    assert pace.may_send(1.9, live=True)
    assert pace.may_send(2.1, live=False)


def test_a_quiet_hour_saves_up_no_more_than_a_second() -> None:
    pace = Pace(LIMITS)
    assert pace.may_send(0.0, live=False)
    assert pace.may_send(3600.0, live=False)
    pace.sent(flight(1, at=3600.0, size=1001))
    pace.acknowledged("metric", 1, 1, 3600.0)
    assert not pace.may_send(3600.0, live=False)


def test_what_is_not_acknowledged_goes_again_later_and_later() -> None:
    pace = Pace(LIMITS)
    pace.sent(flight(1))
    now, waits = 0.0, []
    for _ in range(6):
        wait = pace.wait_s(now, history=False)
        assert wait is not None
        assert pace.due(now + 0.99 * wait) is None
        now += wait
        late = pace.due(now)
        assert late is not None
        pace.resent(late, now)
        waits.append(wait)
    assert waits == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]


def test_live_batches_go_again_before_history() -> None:
    pace = Pace(LIMITS)
    pace.sent(flight(1, at=0.0))
    pace.sent(flight(2, at=1.0, live=True))
    late = pace.due(100.0)
    assert late is not None
    assert late.live
    pace.dropped(late)
    pace.dropped(late)
    assert pace.due(100.0) == flight(1)


def test_the_round_trip_is_learnt_from_what_went_once() -> None:
    pace = Pace(LIMITS)
    pace.sent(flight(1))
    pace.acknowledged("metric", 1, 1, 2.0)
    assert pace.round_trip == 2.0
    pace.sent(flight(2, at=10.0))
    pace.resent(flight(2, at=10.0), 20.0)
    pace.acknowledged("metric", 1, 2, 20.1)
    assert pace.round_trip == 2.0
    pace.sent(flight(3, at=30.0))
    pace.acknowledged("metric", 1, 3, 36.0)
    assert pace.round_trip == 2.5
    pace.acknowledged("metric", 1, 99, 36.0)
    pace.sent(flight(4, at=40.0))
    assert pace.due(49.9) is None
    assert pace.due(50.0) is not None


def test_how_long_to_wait() -> None:
    pace = Pace(LIMITS)
    assert pace.wait_s(0.0, history=False) is None
    assert pace.may_send(0.0, live=False)
    pace.sent(flight(1, size=3000))
    assert pace.wait_s(0.0, history=True) == 2.0
    assert pace.wait_s(0.0, history=False) == 5.0
    assert pace.wait_s(99.0, history=False) == 0.001
    pace.sent(flight(2, size=3000))
    assert pace.wait_s(0.0, history=True) == 5.0


def test_a_new_connection_begins_with_an_empty_window() -> None:
    pace = Pace(LIMITS)
    pace.sent(flight(1))
    pace.sent(flight(2))
    pace.connected()
    assert pace.may_send(0.0, live=False)
    assert pace.due(1000.0) is None


class PaceMachine(RuleBasedStateMachine):
    """However it is driven, the windows and the rate are held, and what is under way comes again."""

    @initialize()
    def begin(self) -> None:
        self.pace = Pace(LIMITS)
        self.now = 0.0
        self.last = 0
        self.history_bytes = 0
        self.began: float | None = None

    @rule(live=st.booleans(), size=st.integers(1, 5000))
    def send(self, live: bool, size: int) -> None:
        if not self.pace.may_send(self.now, live=live):
            return
        self.last += 1
        self.pace.sent(flight(self.last, at=self.now, live=live, size=size))
        if not live:
            self.began = self.now if self.began is None else self.began
            earned = LIMITS.history_rate * (1 + self.now - self.began)
            assert self.history_bytes < earned + 1
            self.history_bytes += size

    @rule(seconds=st.floats(0.0, 30.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(which=st.integers(0, 10))
    def acknowledge(self, which: int) -> None:
        under_way = list(self.pace.flights.values())
        if under_way:
            each = under_way[which % len(under_way)]
            self.pace.acknowledged(each.stream, each.boot, each.last, self.now)
            assert each not in self.pace.flights.values()

    @rule()
    def repeat(self) -> None:
        late = self.pace.due(self.now)
        if late is not None:
            self.pace.resent(late, self.now)
            if not late.live:
                self.history_bytes += late.size

    @invariant()
    def the_windows_are_held_and_nothing_is_forgotten(self) -> None:
        if not hasattr(self, "pace"):
            return
        for live in (True, False):
            assert sum(each.live == live for each in self.pace.flights.values()) <= 2
        if self.pace.flights:
            wait = self.pace.wait_s(self.now, history=False)
            assert wait is not None
            assert wait <= LIMITS.longest_wait_s + 1e-6
            assert self.pace.due(self.now + wait + 0.001) is not None


TestPaceMachine = PaceMachine.TestCase
TestPaceMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
