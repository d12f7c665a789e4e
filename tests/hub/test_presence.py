"""What a state message is worth: each rule by itself, and all of them over histories of boxes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.fleet import DeviceState
from appliance.hub.presence import KnownSession, Verdict, judge
from appliance.hub.rates import BURST_S, DEVICES_REMEMBERED, Rates

KNOWN = KnownSession("b", 5, 500.0, "online", {"a": 3})


def state(epoch: int, status: str = "online", *, instance: str = "b", at: float = 500.0) -> DeviceState:
    return DeviceState(epoch, status, at, "1", instance)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("known", "said", "retained", "verdict"),
    [
        (None, state(1), False, "news"),
        (None, state(1, "lost"), True, "news"),
        (KNOWN, state(6, at=600.0), False, "news"),
        (KNOWN, state(6, "lost", at=600.0), True, "news"),
        (KNOWN, state(5), False, "old"),
        (KNOWN, state(5, "lost"), False, "news"),
        (KNOWN, state(5, "stopping"), False, "news"),
        (KNOWN, state(5, at=501.0), False, "clone"),
        (KNOWN, state(4, "lost", at=400.0), False, "old"),
        (KNOWN, state(4, at=400.0), False, "old"),
        (KNOWN, state(4, at=600.0), False, "clone"),
        (KNOWN, state(4, at=600.0), True, "old"),
        (KNOWN, state(4, "lost", at=600.0), False, "old"),
        (KNOWN, state(1, instance="c"), False, "moved"),
        (KNOWN, state(1, "lost", instance="c"), True, "moved"),
        (KNOWN, state(3, instance="a"), False, "old"),
        (KNOWN, state(4, instance="a"), False, "clone"),
        (KNOWN, state(4, "lost", instance="a"), False, "old"),
        (KnownSession("b", 5, 500.0, "lost"), state(5), False, "old"),
        (KnownSession("b", 5, 500.0, "stopping"), state(5, "lost"), False, "old"),
    ],
)
def test_a_state_is_worth(known: KnownSession | None, said: DeviceState, retained: bool, verdict: Verdict) -> None:
    assert judge(known, said, retained=retained) == verdict


@given(st.lists(st.tuples(st.sampled_from(["online", "lost", "stopping"]), st.booleans()), max_size=20), st.data())
def test_one_box_is_never_a_clone_however_its_messages_arrive(
    sessions: list[tuple[str, bool]], data: st.DataObject
) -> None:
    messages = [state(epoch, at=float(epoch)) for epoch, _ in enumerate(sessions, start=1)]
    messages += [state(epoch, last, at=float(epoch)) for epoch, (last, _) in enumerate(sessions, start=1)]
    arrived = data.draw(st.lists(st.sampled_from(messages), max_size=40)) if messages else []
    known: KnownSession | None = None
    for each in arrived:
        verdict = judge(known, each, retained=False)
        assert verdict in ("news", "old")
        if verdict == "news":
            assert known is None or each.epoch >= known.epoch
            known = KnownSession(each.instance, each.epoch, each.at, each.status)


def test_a_device_that_asks_too_often_is_told_how_long_to_wait() -> None:
    rates = Rates(60)
    assert [rates.take("box-1", 0.0) for _ in range(int(BURST_S))] == [0.0] * int(BURST_S)
    assert rates.take("box-1", 0.0) == pytest.approx(1.0)
    assert rates.take("box-2", 0.0) == 0.0, "others are not held up"
    assert rates.take("box-1", 1.0) == 0.0


def test_rates_forget_who_was_quiet() -> None:
    rates = Rates(60)
    for number in range(DEVICES_REMEMBERED):
        rates.take(f"box-{number}", 0.0)
    rates.take("late", 100.0)
    assert len(rates._full_at) == 1


@given(st.integers(1, 6000), st.lists(st.floats(0, 5), max_size=100))
def test_nobody_gets_more_than_the_rate_and_the_burst(most_a_minute: int, pauses: list[float]) -> None:
    rates, now, taken = Rates(most_a_minute), 0.0, 0
    for pause in pauses:
        now += pause
        taken += rates.take("box-1", now) == 0.0
    assert taken <= max(1.0, BURST_S * most_a_minute / 60) + now * most_a_minute / 60 + 1e-6 * len(pauses) + 1
