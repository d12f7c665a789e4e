"""A second box with one identity is noticed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from appliance.fleet.clones import SUSPICIOUS, WITHIN_S, YOUNG_S, CloneWatch


def ended(watch: CloneWatch, *times: float, stood_s: float = YOUNG_S, taken_over: bool = True) -> list[bool]:
    return [watch.ended(now, stood_s, taken_over=taken_over) for now in times]


def test_the_third_session_that_was_taken_over_within_ten_minutes_is_suspicious() -> None:
    assert ended(CloneWatch(), 0.0, 1.0, 2.0, 3.0) == [False, False, True, True]


def test_so_is_the_sixth_that_ended_young_for_no_reason() -> None:
    assert ended(CloneWatch(), *range(6), stood_s=1.0, taken_over=False) == [False] * 5 + [True]


def test_taken_over_now_and_then_is_not() -> None:
    assert not any(ended(CloneWatch(), 0.0, 301.0, 602.0, 903.0, 1204.0))


def test_sessions_that_stood_for_a_while_are_not_and_count_for_nothing() -> None:
    watch = CloneWatch()
    assert not any(ended(watch, *range(100), taken_over=False))
    assert ended(watch, 101.0, 102.0, 103.0) == [False, False, True]
    assert ended(watch, 104.0, taken_over=False) == [False]


@given(st.lists(st.tuples(st.floats(0, 1000), st.floats(0, 2 * YOUNG_S), st.booleans()), max_size=50))
def test_it_is_suspected_exactly_when_enough_happened_in_the_window(sessions: list[tuple[float, float, bool]]) -> None:
    watch, now = CloneWatch(), 0.0
    points: list[float] = []
    for gap, stood_s, taken_over in sessions:
        now += gap
        new = 2 if taken_over else int(stood_s < YOUNG_S)
        points += [now] * new
        recent = [each for each in points[-SUSPICIOUS:] if now - each <= WITHIN_S]
        assert watch.ended(now, stood_s, taken_over=taken_over) == (new > 0 and len(recent) == SUSPICIOUS)
