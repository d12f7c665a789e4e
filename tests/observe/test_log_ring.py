"""The last log lines, as they may leave the box."""

from __future__ import annotations

import json
import logging

import pytest

from appliance.observe.log_ring import MOST_CHARACTERS, LogRing, last_lines

SECRET = "the prompt of a client"
OURS = logging.getLogger("appliance.tests")


@pytest.fixture(autouse=True)
def everything_is_logged() -> object:
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.DEBUG)
    yield
    root.setLevel(before)


def fail() -> None:
    raise ValueError(SECRET)


def test_the_newest_lines_are_kept_and_the_oldest_give_way() -> None:
    ring = LogRing(3)
    for n in range(5):
        ring.handle(logging.LogRecord("appliance", logging.INFO, "", 0, "line %d", (n,), None))
    assert [json.loads(line)["message"] for line in ring.tail(10)] == ["line 2", "line 3", "line 4"]
    assert [json.loads(line)["message"] for line in ring.tail(1)] == ["line 4"]
    assert ring.tail(0) == []


def test_lines_can_be_asked_for_by_severity() -> None:
    with last_lines() as ring:
        OURS.info("a")
        OURS.error("b")
    assert [json.loads(line)["message"] for line in ring.tail(9, least=logging.WARNING)] == ["b"]


def test_nothing_is_kept_outside_of_the_block() -> None:
    with last_lines() as ring:
        pass
    OURS.error("later")
    assert ring.tail(9) == []
    assert ring not in logging.getLogger().handlers


def test_what_an_error_says_stays_on_the_box_but_where_it_was_is_told() -> None:
    with last_lines() as ring:
        try:
            fail()
        except ValueError:
            OURS.exception("a step failed")
    (line,) = ring.tail(9)
    assert SECRET not in line
    assert json.loads(line)["exception"].startswith("ValueError at test_log_ring.py:")


def test_what_another_library_says_stays_on_the_box() -> None:
    with last_lines() as ring:
        logging.getLogger("appliances.of.others").warning(SECRET)
        logging.getLogger("another.library").error(SECRET)
    assert len(ring.tail(9)) == 2
    assert not any(SECRET in line for line in ring.tail(9))


def test_what_is_logged_for_debugging_stays_on_the_box() -> None:
    with last_lines() as ring:
        OURS.debug(SECRET)
    assert ring.tail(9) == []


def test_a_line_is_bounded_visible_and_one_line() -> None:
    with last_lines() as ring:
        OURS.info("a\nb\x1b[2J%s", "x" * 10_000)
    (line,) = ring.tail(9)
    assert "\n" not in line
    assert line.isprintable()
    assert len(line) < MOST_CHARACTERS + 300


def test_a_record_that_cannot_be_written_hurts_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    ring = LogRing()
    ring.handle(logging.LogRecord("appliance", logging.INFO, "", 0, "%d", ("no number",), None))
    assert ring.tail(9) == []
    assert "Logging error" in capsys.readouterr().err
