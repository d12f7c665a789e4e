"""The window: every block is asked for until it comes, the link is full, and those beside us hardly wait."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from appliance.core.fleet import BLOCK_BYTES
from appliance.fleet.window import FIRST_BYTES, LARGEST_BYTES, LEAST_PATIENCE_S, Ask, Pace, Window
from appliance.fleet.window_size import AHEAD
from tests.fleet.simulated_link import SimulatedLink

MODEL_BLOCKS = 1526  # 100 MB
LARGEST_BLOCKS = LARGEST_BYTES // BLOCK_BYTES


def share(link: SimulatedLink, seconds: float, blocks: int = MODEL_BLOCKS) -> float:
    return blocks * BLOCK_BYTES / link.bytes_per_s / seconds


@pytest.mark.parametrize("late", [0.0, 0.6])
def test_a_link_of_2_mb_a_second_is_full_and_its_queue_stays_below_half_a_second(late: float) -> None:
    link = SimulatedLink(late=late)
    seconds = link.run(Window(range(MODEL_BLOCKS)))
    assert share(link, seconds) > 0.95
    assert max(queue for _, queue in link.queues) < 0.45
    assert link.sent == MODEL_BLOCKS


def test_asking_goes_on_for_a_while_though_what_is_due_waits_behind_a_lost_segment() -> None:
    link = SimulatedLink()
    window = Window(range(MODEL_BLOCKS))
    link.run(window, until=5.0)
    window.ask(link.now)
    before = window.outstanding
    assert before == window.size_bytes // BLOCK_BYTES
    ahead = 0
    while window.ask_at() < math.inf:
        assert window.ask(window.ask_at() - 0.001) == []
        ahead += sum(len(ask.blocks) for ask in window.ask(window.ask_at() + 0.001))
    assert ahead == int(AHEAD * before)
    assert window.ask(link.now + LEAST_PATIENCE_S / 2) == []


def test_a_delay_that_is_not_ours_does_not_shrink_the_window_for_good() -> None:
    link = SimulatedLink(late=0.6, noise_s=0.35)
    assert share(link, link.run(Window(range(MODEL_BLOCKS)))) > 0.75


def test_a_thin_link_gets_a_small_window_and_a_fat_one_the_largest() -> None:
    thin, fat = SimulatedLink(bytes_per_s=1e5, round_trip_s=0.3), SimulatedLink(bytes_per_s=2e7, round_trip_s=0.05)
    assert share(thin, thin.run(Window(range(200))), 200) > 0.9
    assert max(thin.windows) == FIRST_BYTES
    fat.run(Window(range(MODEL_BLOCKS)))
    assert max(fat.windows) <= LARGEST_BYTES
    assert max(fat.windows) > LARGEST_BYTES // 2


def test_lost_blocks_are_asked_for_again_and_make_the_window_smaller_once() -> None:
    link = SimulatedLink(drops=lambda number: number % 50 == 0)
    window = Window(range(500))
    link.run(window)
    assert window.done
    assert 500 < link.sent < 520


def test_a_block_is_late_after_two_seconds_or_four_round_trips() -> None:
    window = Window([0, 1, 2])
    window.ask(0.0)
    assert window.next_expiry() == 0.0
    assert window.ask(LEAST_PATIENCE_S - 0.01) == []
    (again,) = window.ask(LEAST_PATIENCE_S)
    assert again.blocks == (0,)  # half of the window
    assert window.arrived(1, LEAST_PATIENCE_S + 0.1)  # late, and still welcome
    assert not window.arrived(1, LEAST_PATIENCE_S + 0.2)
    slow = Window(range(4))
    slow.ask(0.0)
    slow.arrived(0, 1.5)
    assert slow.patience_s == pytest.approx(6.0)
    assert Window([]).next_expiry() is None


def test_losses_within_one_patience_halve_the_window_once() -> None:
    window = Window(range(40))
    now = 0.0
    for _ in range(4):
        for ask in window.ask(now):
            for block in ask.blocks:
                window.arrived(block, now + 0.1)
        now += 0.1
    before = window.size_bytes // BLOCK_BYTES
    window.ask(now)
    window.ask(now + 1.0)
    window.ask(now + 2.0)
    assert window.size_bytes == before // 2 * BLOCK_BYTES
    window.ask(now + 3.0)
    assert window.size_bytes == before // 2 * BLOCK_BYTES


def test_what_was_never_asked_for_is_not_taken() -> None:
    window = Window([5, 6])
    window.ask(0.0)
    assert not window.arrived(4, 0.1)
    assert window.arrived(5, 0.1)
    assert not window.arrived(5, 0.1)
    assert window.outstanding == 1


def test_what_came_wrong_is_asked_for_first() -> None:
    window = Window(range(100))
    window.ask(0.0)
    assert window.arrived(0, 0.1)
    assert window.arrived(1, 0.1)
    window.put_back([0, 1])
    assert window.ask(0.2)[0].blocks[:2] == (0, 1)


def test_a_new_connection_asks_for_what_was_outstanding_with_the_first_window() -> None:
    link = SimulatedLink()
    window = Window(range(300))
    link.run(window, until=2.0)
    assert window.size_bytes > FIRST_BYTES
    outstanding = window.outstanding
    assert outstanding > 2
    window.disconnected()
    assert (window.outstanding, window.size_bytes) == (0, FIRST_BYTES)
    (ask,) = window.ask(10.0)
    assert len(ask.blocks) == FIRST_BYTES // BLOCK_BYTES


def test_what_was_interrupted_has_less_on_its_way_until_more_has_come() -> None:
    bold, careful = SimulatedLink(), SimulatedLink()
    bold.run(Window(range(MODEL_BLOCKS)))
    seconds = careful.run(Window(range(MODEL_BLOCKS), careful=True))
    outstanding = [size / (2 * FIRST_BYTES + 64 * BLOCK_BYTES * came / 64) for came, size in enumerate(careful.windows)]
    assert max(outstanding) < 1.0
    assert max(careful.windows[:200]) < max(bold.windows[:200]) / 2
    assert share(careful, seconds) > 0.85, "and in the end it costs a box that lives a few seconds"


def test_a_new_connection_is_careful_too() -> None:
    link = SimulatedLink()
    window = Window(range(MODEL_BLOCKS))
    link.run(window, until=10.0)
    was = window.size_bytes
    window.disconnected()
    SimulatedLink(now=20.0).run(window, until=22.0)
    assert window.size_bytes < was / 2


def test_a_window_that_a_cap_keeps_from_being_filled_does_not_grow() -> None:
    window = Window(range(400))
    now = 0.0
    for _ in range(50):
        (ask,) = window.ask(now, 1)
        now += 0.1
        assert window.arrived(ask.blocks[0], now)
    assert window.size_bytes == FIRST_BYTES


def test_a_request_speaks_of_at_most_128_blocks_and_sets_the_bits_of_those_it_wants() -> None:
    ask = Ask((8, 9, 17))
    assert (ask.first, ask.missing) == (8, bytes([0b11, 0b10]))
    far = Window([0, 127, 128, 500], first_bytes=LARGEST_BYTES).ask(0.0)
    assert [each.blocks for each in far] == [(0, 127), (128,), (500,)]
    assert all(len(each.missing) <= 16 for each in far)


def test_few_requests_are_made_rather_than_one_for_each_block() -> None:
    window = Window(range(500), first_bytes=LARGEST_BYTES)
    window.ask(0.0)
    window.arrived(LARGEST_BLOCKS - 1, 0.1)
    assert window.ask(0.1) == []
    for block in range(LARGEST_BLOCKS * 3 // 4, LARGEST_BLOCKS - 1):
        window.arrived(block, 0.1)
    assert len(window.ask(0.1)) == 1


def test_a_cap_lets_through_its_rate_and_no_burst_beyond_a_second() -> None:
    pace = Pace(2 * BLOCK_BYTES, now=0.0)
    assert pace.blocks(100.0) == 2
    pace.take(2)
    assert (pace.blocks(100.0), pace.wait_s()) == (0, 0.5)
    assert pace.blocks(100.5) == 1
    assert pace.wait_s() == 0.0
    free = Pace(0, now=0.0)
    free.take(1000)
    assert (free.blocks(0.0), free.wait_s()) == (LARGEST_BLOCKS, 0.0)
    thin = Pace(1, now=0.0)
    assert thin.blocks(0.0) == 1  # or nothing would ever go


class Downloads(RuleBasedStateMachine):
    """Blocks come, get lost, come twice and come wrong, and connections break; nothing is forgotten."""

    @initialize(wanted=st.sets(st.integers(0, 400), max_size=80))
    def begin(self, wanted: set[int]) -> None:
        self.window = Window(wanted)
        self.missing = set(wanted)
        self.asked: set[int] = set()
        self.now = 0.0

    @rule(after=st.floats(0, 5), at_most=st.integers(0, 64))
    def ask(self, after: float, at_most: int) -> None:
        self.now += after
        for ask in self.window.ask(self.now, at_most):
            assert set(ask.blocks) <= self.missing
            self.asked |= set(ask.blocks)

    @precondition(lambda self: self.asked & self.missing)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.asked & self.missing)))
        assert self.window.arrived(block, self.now)
        assert not self.window.arrived(block, self.now)
        self.missing.discard(block)

    @precondition(lambda self: self.asked - self.missing)
    @rule(data=st.data())
    def come_wrong(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.asked - self.missing)))
        self.window.put_back([block])
        self.missing.add(block)
        self.asked.discard(block)

    @rule()
    def break_off(self) -> None:
        self.window.disconnected()

    @invariant()
    def holds(self) -> None:
        assert self.window.done == (not self.missing)
        assert self.window.outstanding <= len(self.missing)
        assert BLOCK_BYTES <= self.window.size_bytes <= LARGEST_BYTES

    def teardown(self) -> None:
        if not hasattr(self, "missing"):
            return
        for _ in range(1000):
            if not self.missing:
                return
            self.now += 100.0
            for ask in self.window.ask(self.now):
                for block in ask.blocks:
                    self.window.arrived(block, self.now)
                    self.missing.discard(block)
        raise AssertionError(f"{self.missing} never come")


TestDownloads = Downloads.TestCase
TestDownloads.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
