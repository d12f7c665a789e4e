"""Which command is carried out, and which is refused at the door."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.fleet import CLOCK_TOLERANCE_S, Command
from appliance.fleet.command_policy import LONGEST_LIFE_S, newest_that_fit, refusal

NOW = 1_800_000_000.0
KNOWN = {"ping"}


def code(name: str = "ping", *, life_s: float = 60.0, retained: bool = False) -> str:
    refused = refusal(Command("c", name, {}, NOW + life_s), NOW, retained=retained, known=KNOWN)
    return refused.code if refused else ""


def test_a_command_for_now_is_carried_out() -> None:
    assert code() == ""
    assert code(life_s=LONGEST_LIFE_S + CLOCK_TOLERANCE_S) == ""


@pytest.mark.parametrize("life_s", [0.0, -1.0, -NOW])
def test_an_expired_command_is_refused(life_s: float) -> None:
    assert code(life_s=life_s) == "expired"


def test_a_command_that_would_outlive_the_memory_of_its_reply_is_refused() -> None:
    assert code(life_s=LONGEST_LIFE_S + CLOCK_TOLERANCE_S + 1) == "expires_too_late"


def test_a_kept_command_is_refused_whatever_it_says() -> None:
    assert code(retained=True) == code("nonsense", life_s=-1, retained=True) == "retained"


def test_an_unknown_command_is_refused_with_those_there_are() -> None:
    refused = refusal(Command("c", "format_disk", {}, NOW + 1), NOW, retained=False, known={"b", "a"})
    assert refused is not None
    assert (refused.id, refused.ok, refused.code) == ("c", False, "unknown_command")
    assert refused.detail.endswith("there are: a, b.")


def test_the_newest_lines_are_told_as_far_as_they_fit() -> None:
    assert newest_that_fit(["aa", "bb", "cc"], 10) == ["bb", "cc"]
    assert newest_that_fit(["aa", "bb", "cc"], 100) == ["aa", "bb", "cc"]
    assert newest_that_fit(["a" * 100], 10) == []
    assert newest_that_fit([], 10) == []


@given(st.lists(st.text(max_size=20)), st.integers(0, 200))
def test_what_is_told_fits_is_the_newest_and_leaves_out_no_more_than_it_must(lines: list[str], budget: int) -> None:
    told = newest_that_fit(lines, budget)
    sizes = [len(msgspec.json.encode(each)) + 1 for each in lines]
    assert told == lines[len(lines) - len(told) :]
    assert sum(sizes[len(lines) - len(told) :]) <= budget
    assert len(told) == len(lines) or sum(sizes[len(lines) - len(told) - 1 :]) > budget


@given(st.text(max_size=9), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
def test_nothing_but_a_fresh_known_command_passes(name: str, expires: float, retained: bool) -> None:
    refused = refusal(Command("c", name, {}, expires), NOW, retained=retained, known=KNOWN)
    fresh = NOW < expires <= NOW + LONGEST_LIFE_S + CLOCK_TOLERANCE_S
    assert (refused is None) == (fresh and not retained and name in KNOWN)
