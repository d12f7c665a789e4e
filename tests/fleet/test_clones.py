"""A second box with one identity is noticed."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from appliance.fleet.clones import SUSPICIOUS, WITHIN_S, CloneWatch


def test_the_third_time_within_ten_minutes_is_suspicious() -> None:
    watch = CloneWatch()
    assert [watch.taken_over(now) for now in (0.0, 1.0, 2.0)] == [False, False, True]


def test_taken_over_now_and_then_is_not() -> None:
    watch = CloneWatch()
    assert not any(watch.taken_over(now) for now in (0.0, 300.0, 601.0, 901.0, 1202.0))


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=50))
def test_it_is_suspected_exactly_when_enough_happened_in_the_window(gaps: list[float]) -> None:
    watch = CloneWatch()
    at: list[float] = []
    for now in accumulate(gaps):
        at.append(now)
        recent = [each for each in at[-SUSPICIOUS:] if at[-1] - each <= WITHIN_S]
        assert watch.taken_over(at[-1]) == (len(recent) == SUSPICIOUS)
