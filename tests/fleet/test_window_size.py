"""The size of the window: it fills the link, leaves a small queue, and tells its own queue from another's."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.fleet.window_size import AHEAD, BASE_COUNTS_S, BASE_COUNTS_TRIPS, LEAST_BLOCKS, QUEUE_S, WindowSize

FIRST, MOST = 2.0, 64.0


class Way:
    """Sends one block a round, and says how long it took.

    Attributes:
        size: Of the window that is told.
        now: The time.
    """

    def __init__(self, *, careful: bool = False, first: float = FIRST) -> None:
        self.size = WindowSize(first, MOST, careful=careful)
        self.now = 0.0

    def rounds(self, count: int, took: float, *, is_full: bool = True) -> list[int]:
        """Return the sizes after each round. The last block's round ends with the next one."""
        sizes = []
        for _ in range(count):
            if is_full:
                self.size.filled()
            asked_at = self.now
            self.now += took
            self.size.came()
            self.size.took(asked_at, self.now)
            sizes.append(self.size.blocks)
        return sizes


def test_a_window_grows_by_half_a_round_until_there_is_a_queue_and_then_stays() -> None:
    way = Way()
    assert way.rounds(6, 0.1) == [2, 3, 4, 6, 10, 15]
    before = way.rounds(1, 0.1 + QUEUE_S)[-1]
    assert before == 22
    assert set(way.rounds(30, 0.1 + QUEUE_S)) == {22}, "the queue is what it should be"


def test_a_queue_that_is_too_long_makes_the_window_smaller_and_one_that_is_short_larger() -> None:
    way = Way()
    way.rounds(6, 0.1)
    long = way.rounds(4, 0.5)
    assert long[-1] < long[0]
    short = way.rounds(4, 0.15)
    assert short[-1] > long[-1]


def test_a_window_that_was_not_filled_does_not_grow_for_nothing_says_that_more_would_do() -> None:
    way = Way()
    assert set(way.rounds(20, 0.1, is_full=False)) == {2}
    assert way.rounds(1, 0.1) == [3]


def test_a_round_is_judged_by_the_mean_of_its_blocks() -> None:
    size = WindowSize(8.0, MOST, careful=False)
    size.took(0.0, 0.1)
    size.took(0.0, 0.3)  # asked for before the round began
    size.filled()
    size.took(0.1, 0.2)
    assert size.blocks == 8, "the mean of 0.1 and 0.3 is a queue of 0.1, and the base is 0.1"


def test_after_ten_seconds_the_window_is_made_small_to_see_what_the_way_takes() -> None:
    way = Way()
    way.rounds(6, 0.1)
    before = way.rounds(2, 0.2)[-1]
    sizes = way.rounds(60, 0.2)
    assert min(sizes) < before / 2
    at = sizes.index(min(sizes))
    assert BASE_COUNTS_S - 1 < 0.8 + 0.2 * at < BASE_COUNTS_S + 1
    assert sizes[at : at + 3] == [min(sizes), min(sizes), sizes[at + 2]], "a round to drain, and one to look"
    assert sizes[at + 2] > before, "what was a queue before is what the way takes by itself now"


def test_a_long_way_is_looked_at_less_often() -> None:
    way = Way()
    sizes = way.rounds(BASE_COUNTS_TRIPS + 6, 2.0)
    smaller = next(at for at in range(1, len(sizes)) if sizes[at] < sizes[at - 1])
    assert smaller == BASE_COUNTS_TRIPS + 1 > BASE_COUNTS_S / 2.0


def test_delay_that_a_smaller_window_does_not_shorten_is_looked_at_soon_and_is_not_ours() -> None:
    way = Way()
    way.rounds(8, 0.1)
    full = way.rounds(1, 0.1)[-1]
    sizes = way.rounds(8, 0.6)
    lowest = min(sizes)
    assert lowest < full / 3
    assert way.now < BASE_COUNTS_S
    assert way.rounds(30, 0.6)[-1] > full, "a longer way takes a larger window"


def test_the_smallest_window_is_not_taken_for_late() -> None:
    way = Way()
    way.rounds(3, 0.1)
    assert set(way.rounds(10, 0.9)[4:]) == {LEAST_BLOCKS}, "a look at a single block would cost half of a thin link"


def test_a_way_that_became_shorter_is_believed_a_quarter_at_a_time() -> None:
    way = Way(first=8.0)
    way.rounds(1, 0.4)
    way.rounds(1, 0.1)
    sizes = way.rounds(4, 0.4)
    assert sizes[-1] < sizes[0] * 1.5, "one lucky round is no new base"


def test_lost_blocks_halve_the_window_and_what_it_returns_to_after_a_look() -> None:
    way = Way()
    way.rounds(6, 0.1)
    before = way.size.blocks
    way.size.halve()
    assert way.size.blocks == before // 2
    for _ in range(10):
        way.size.halve()
    assert way.size.blocks == 1


def test_a_careful_window_is_bounded_by_what_has_come() -> None:
    bold, careful = Way(), Way(careful=True)
    assert bold.rounds(20, 0.1)[-1] == MOST
    assert careful.rounds(20, 0.1)[-1] == 2
    for _ in range(640 - 20):
        careful.size.came()
    assert careful.rounds(12, 0.1)[-1] == 12
    for _ in range(64 * 64):
        careful.size.came()
    assert careful.rounds(20, 0.1)[-1] == MOST


def test_while_nothing_comes_what_is_due_by_now_is_taken_as_come() -> None:
    way = Way(first=20.0)
    assert way.size.ahead(1.0) == 0, "before there was a queue nobody knows what is due"
    assert way.size.silence_s(1) == math.inf
    way.rounds(2, 0.1)
    way.rounds(2, 0.1 + QUEUE_S)
    assert way.size.blocks == 45, "one is due each 0.2 s / 45"
    assert [way.size.ahead(silence) for silence in (0.0, 0.008, 0.009, 0.031, 0.2, 10.0)] == [0, 0, 1, 5, 18, 18]
    assert AHEAD * 45 == 18
    assert way.size.silence_s(5) == pytest.approx(0.0267, rel=0.01)
    assert way.size.silence_s(19) == math.inf


def test_a_careful_window_asks_ahead_only_within_its_bound() -> None:
    way = Way(careful=True)
    for _ in range(640):
        way.size.came()
    way.rounds(8, 0.1)
    way.rounds(1, 0.5)
    assert way.size.blocks + way.size.ahead(10.0) <= FIRST + (640 + 9) / 64


@settings(max_examples=60, deadline=None)
@given(
    careful=st.booleans(),
    trips=st.lists(st.tuples(st.floats(1e-6, 30.0), st.integers(1, 40), st.booleans(), st.booleans()), max_size=60),
)
def test_whatever_the_way_does_the_window_has_a_block_and_not_too_many(
    careful: bool, trips: list[tuple[float, int, bool, bool]]
) -> None:
    way, came = Way(careful=careful), 0
    for took, count, is_full, lost in trips:
        came += count
        way.rounds(count, took, is_full=is_full)
        if lost:
            way.size.halve()
        assert 1 <= way.size.blocks <= MOST
        assert 0 <= way.size.ahead(took) <= MOST - way.size.blocks
        assert not careful or way.size.blocks + way.size.ahead(took) <= FIRST + came / 64
        after = way.size.silence_s(2)
        assert after == math.inf or way.size.ahead(after * (1 + 1e-9)) >= 2


@pytest.mark.parametrize("took", [0.02, 0.1, 0.6])
def test_with_no_queue_at_all_the_window_becomes_the_largest(took: float) -> None:
    assert Way().rounds(40, took)[-1] == MOST
