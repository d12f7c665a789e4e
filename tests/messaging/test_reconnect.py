"""The rule by which a lost connection is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.messaging.reconnect import LONGEST_S, STEADY_S, Reconnect


def ceilings(count: int) -> list[float]:
    state, found = Reconnect(), []
    for _ in range(count):
        state = state.after(None)
        found.append(state.delay_s(1.0))
        state = state.again()
    return found


def test_the_ceiling_doubles_up_to_five_minutes() -> None:
    assert ceilings(12) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]


@pytest.mark.parametrize(("connected_s", "ceiling_s"), [(None, 32), (0.0, 32), (STEADY_S - 0.1, 32), (STEADY_S, 1)])
def test_only_a_connection_that_stood_for_a_minute_starts_the_count_anew(
    connected_s: float | None, ceiling_s: float
) -> None:
    assert Reconnect(5).after(connected_s).delay_s(1.0) == ceiling_s


def test_the_jitter_is_a_full_one() -> None:
    assert Reconnect(4).delay_s(0.0) == 0.0
    assert Reconnect(4).delay_s(0.25) == 4.0


def test_a_hold_off_is_waited_for_and_widens_the_spread() -> None:
    assert Reconnect().delay_s(0.0, 60.0) == 60.0
    assert Reconnect().delay_s(1.0, 60.0) == 120.0
    assert Reconnect().delay_s(1.0, 3600.0) == 3900.0
    assert Reconnect().delay_s(1.0, -5.0) == 1.0


@given(st.lists(st.none() | st.floats(0, 1e6)), st.floats(0, 1), st.floats(-1e6, 1e6))
def test_the_delay_stays_between_the_hold_off_and_five_minutes_more(
    history: list[float | None], fraction: float, hold_off_s: float
) -> None:
    state = Reconnect()
    for stood in history:
        state = state.after(stood).again()
    assert max(0.0, hold_off_s) <= state.delay_s(fraction, hold_off_s) <= max(0.0, hold_off_s) + LONGEST_S
