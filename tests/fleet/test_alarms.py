from __future__ import annotations

import math

import hypothesis.strategies as st
from hypothesis import given

from appliance.fleet.alarms import LONGEST_HOLD_S, NOTE_S, AlarmBook, Change, Reading, Rule

HOT = Rule("hot", raise_at=90.0, clear_at=80.0, raise_s=30.0, clear_s=60.0, severity="critical")
FULL = Rule("full", raise_at=0.05, clear_at=0.10)


def look(book: AlarmBook, now: float, **values: float) -> list[tuple[str, bool]]:
    changes = book.observe({name: Reading(value, f"{value:g}") for name, value in values.items()}, now, 5000.0 + now)
    return [(each.name, each.raised) for each in changes]


def test_an_alarm_is_raised_after_a_while_and_ends_after_a_while() -> None:
    book = AlarmBook((HOT,))
    assert look(book, 0.0, hot=95.0) == []
    assert look(book, 29.0, hot=90.0) == []
    assert look(book, 30.0, hot=91.0) == [("hot", True)]
    assert (book.open["hot"].since, book.open["hot"].severity, book.open["hot"].detail) == (5030.0, "critical", "91")
    assert look(book, 40.0, hot=79.0) == []
    assert look(book, 99.0, hot=80.0) == []
    assert look(book, 100.0, hot=75.0) == [("hot", False)]
    assert book.open == {}


def test_between_the_limits_nothing_changes_and_the_waiting_begins_anew() -> None:
    book = AlarmBook((HOT,))
    look(book, 0.0, hot=95.0)
    look(book, 20.0, hot=85.0)
    assert look(book, 31.0, hot=95.0) == []
    assert look(book, 61.0, hot=95.0) == [("hot", True)]
    look(book, 70.0, hot=70.0)
    look(book, 100.0, hot=85.0)
    assert look(book, 131.0, hot=70.0) == []
    assert look(book, 191.0, hot=70.0) == [("hot", False)]


def test_low_values_are_bad_where_the_rule_says_so() -> None:
    book = AlarmBook((FULL,))
    assert look(book, 0.0, full=0.06) == []
    assert look(book, 1.0, full=0.05) == [("full", True)]
    look(book, 2.0, full=0.2)
    assert look(book, 62.0, full=0.2) == [("full", False)]


def test_without_a_value_an_alarm_stays_as_it_is() -> None:
    book = AlarmBook((FULL,))
    assert look(book, 0.0) == []
    look(book, 1.0, full=0.0)
    assert look(book, 1e6) == []
    assert look(book, 2e6, full=math.nan) == []
    assert "full" in book.open


def test_an_alarm_that_comes_and_goes_is_held_longer_each_time() -> None:
    book = AlarmBook((FULL,))
    now, held = 0.0, []
    for _ in range(8):
        assert look(book, now, full=0.0) == [("full", True)]
        begin = now
        while not look(book, now, full=0.5):
            now += 10.0
        held.append(now - begin)
        now += 10.0
    assert held == [60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3600.0, 3600.0]
    assert LONGEST_HOLD_S == 3600.0
    look(book, now + 4000.0, full=0.0)
    look(book, now + 4001.0, full=0.5)
    assert look(book, now + 4061.0, full=0.5) == [("full", False)]


def test_an_event_is_told_once_and_ends_by_itself() -> None:
    book = AlarmBook(())
    told = [Change("cloned_identity", raised=True, severity="critical", value=1.0, detail="epoch 7")]
    assert book.note("cloned_identity", "epoch 7", 0.0, 50.0) == told
    assert book.open["cloned_identity"].since == 50.0
    assert book.note("cloned_identity", "epoch 8", 1000.0, 1050.0) == []
    assert look(book, NOTE_S + 999.0) == []
    assert look(book, NOTE_S + 1000.0) == [("cloned_identity", False)]
    assert book.open == {}


def test_events_of_many_names_are_bounded() -> None:
    book = AlarmBook(())
    for number in range(500):
        book.note(f"event {number}", "", 0.0, 0.0)
    assert len(book.open) == 50


@given(st.lists(st.tuples(st.floats(0.1, 600.0), st.floats(60.0, 110.0)), max_size=60))
def test_what_is_told_alternates_and_agrees_with_what_is_open(steps: list[tuple[float, float]]) -> None:
    book = AlarmBook((HOT,))
    now, told = 0.0, []
    for seconds, value in steps:
        now += seconds
        told += [raised for _, raised in look(book, now, hot=value)]
        assert ("hot" in book.open) == bool(told and told[-1])
    assert told == [number % 2 == 0 for number in range(len(told))]
