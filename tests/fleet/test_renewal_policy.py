"""When a certificate is renewed, and when it is tried again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from appliance.fleet.renewal_policy import (
    CLOCK_CHECK_S,
    LONGEST_RETRY_S,
    SHORTEST_RETRY_S,
    SPREAD,
    Validity,
    retry_s,
    until_due_s,
)

DAY_S = 86_400.0
LIFE = Validity(1000 * DAY_S, 1090 * DAY_S)


def test_it_is_renewed_at_two_thirds_of_its_life() -> None:
    assert LIFE.renewal == 1060 * DAY_S
    assert until_due_s(LIFE, now=1060 * DAY_S - 60, fraction=0.0) == 60.0
    assert until_due_s(LIFE, now=1060 * DAY_S, fraction=0.0) == 0.0
    assert until_due_s(LIFE, now=2000 * DAY_S, fraction=1.0) == 0.0


def test_a_fleet_of_one_day_does_not_renew_in_one_minute() -> None:
    assert until_due_s(LIFE, now=1060 * DAY_S, fraction=1.0) == CLOCK_CHECK_S
    assert until_due_s(LIFE, now=LIFE.renewal + 90 * DAY_S * SPREAD, fraction=1.0) == 0.0


def test_a_clock_of_1970_renews_nothing_and_looks_again() -> None:
    assert until_due_s(LIFE, now=0.0, fraction=0.0) == CLOCK_CHECK_S


def test_what_is_refused_is_asked_again_ever_more_rarely() -> None:
    assert retry_s(1, fraction=0.0) == SHORTEST_RETRY_S
    assert retry_s(1, fraction=1.0) == 2 * SHORTEST_RETRY_S
    assert retry_s(10_000, fraction=1.0) == LONGEST_RETRY_S


@given(st.floats(0, 4e9), st.floats(1, 4e8), st.floats(0, 5e9), st.floats(0, 1), st.integers(1, 10_000))
def test_waits_are_short_enough_to_notice_a_new_clock_and_none_is_missed(
    begins: float, life: float, now: float, fraction: float, failures: int
) -> None:
    validity = Validity(begins, begins + life)
    wait = until_due_s(validity, now=now, fraction=fraction)
    assert 0.0 <= wait <= CLOCK_CHECK_S
    if now >= validity.ends:
        assert wait == 0.0
    if now < validity.renewal:
        assert wait > 0.0
    assert SHORTEST_RETRY_S <= retry_s(failures, fraction=fraction) <= LONGEST_RETRY_S
