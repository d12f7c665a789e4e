"""Which items share a batch: everything once, within the padded budget, little padded, in turns, and nobody starves."""

from __future__ import annotations

import math
import random

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.core.types import Priority
from appliance.engine.onnx.batcher import AGEING_S, SLACK_SHARE, SLACK_TOKENS, Batcher, Place
from appliance.engine.onnx.work import Item

TOKENS, ROWS = 256, 6

ITEMS = st.builds(
    Item,
    payload=st.none(),
    rows=st.integers(1, 4),
    length=st.integers(1, 2 * TOKENS),
    key=st.sampled_from([(), "other", None]),
)


def items(*lengths: int, rows: int = 1, key: object = ()) -> list[Item]:
    return [Item(None, rows, length, key) for length in lengths]


class Batching(RuleBasedStateMachine):
    """Jobs of all kinds and priorities come, expire and go, while time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.batcher = Batcher(rows=ROWS, tokens=TOKENS)
        self.now = 0.0
        self.jobs = 0
        self.waiting: dict[int, dict[int, Item]] = {}
        self.kinds: dict[int, int] = {}
        self.deadlines: dict[int, float] = {}

    @rule(
        given=st.lists(ITEMS, min_size=1, max_size=8),
        kind=st.integers(0, 1),
        priority=st.sampled_from(Priority),
        time_left=st.sampled_from([0.0, 3.0, math.inf]),
    )
    def submit(self, given: list[Item], kind: int, priority: Priority, time_left: float) -> None:
        self.jobs += 1
        deadline = self.now + time_left
        self.batcher.submit(self.jobs, given, kind=kind, priority=priority, now=self.now, deadline=deadline)
        self.waiting[self.jobs] = dict(enumerate(given))
        self.kinds[self.jobs], self.deadlines[self.jobs] = kind, deadline

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.waiting)))
        self.batcher.cancel(job)
        self.batcher.cancel(job)
        del self.waiting[job]

    @rule(seconds=st.floats(0, 7))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        due = {job for job in self.waiting if self.deadlines[job] <= self.now}
        assert set(self.batcher.expire(self.now)) == due
        for job in due:
            del self.waiting[job]

    @rule()
    def take_a_batch(self) -> None:
        self._take()

    @rule(rows=st.integers(1, ROWS))
    def take_a_small_batch(self, rows: int) -> None:
        before = self.batcher.rows
        self._take(rows)
        assert before - self.batcher.rows <= max(rows, 4)  # an item has up to 4 rows, and is never split

    @rule()
    def after_a_while_nobody_waits_for_more_batches_than_there_are_others(self) -> None:
        """Once waiting has made all alike, whatever their priority was."""
        self.time_passes(AGEING_S * max(Priority) + 0.001)  # the clock's sums are rounded
        first = set(self.waiting)
        unserved = set(first)
        for _ in range(len(first)):
            unserved -= self._take()
        assert not unserved

    def _take(self, most_rows: float = math.inf) -> set[int]:
        batch = self.batcher.next_batch(self.now, most_rows)
        assert bool(batch) == bool(self.waiting)
        taken = [self.waiting[each.job].pop(each.index) for each in batch]  # of others there is nothing
        if len(batch) > 1:
            assert {each.key for each in taken} != {None}
            assert len({(self.kinds[place.job], item.key) for place, item in zip(batch, taken, strict=True)}) == 1
            rows = sum(each.rows for each in taken)
            longest, shortest = max(each.length for each in taken), min(each.length for each in taken)
            assert rows <= ROWS
            assert rows * longest <= TOKENS
            assert longest - shortest <= SLACK_TOKENS + longest // SLACK_SHARE
        jobs = {each.job for each in batch}
        for job in jobs:
            if not self.waiting[job]:
                del self.waiting[job]
        return jobs

    @invariant()
    def it_is_idle_when_nothing_waits(self) -> None:
        assert self.batcher.idle == (not self.waiting)
        assert self.batcher.rows == sum(item.rows for items in self.waiting.values() for item in items.values())


TestBatching = Batching.TestCase


def batches(batcher: Batcher, now: float = 0.0) -> list[list[tuple[int, int]]]:
    found = []
    while not batcher.idle:
        found.append([(each.job, each.index) for each in batcher.next_batch(now)])
    return found


def test_nothing_comes_of_nothing() -> None:
    assert Batcher(rows=4, tokens=100).next_batch() == []


def test_a_batch_closes_at_its_padded_tokens() -> None:
    batcher = Batcher(rows=99, tokens=30)
    batcher.submit(1, items(10, 9, 9, 8))
    assert batches(batcher) == [[(1, 0), (1, 2), (1, 1)], [(1, 3)]]


def test_a_batch_closes_at_its_rows() -> None:
    batcher = Batcher(rows=5, tokens=1000)
    batcher.submit(1, items(1, 1, 1, rows=2))
    assert [len(each) for each in batches(batcher)] == [2, 1]


def test_an_item_over_the_limit_runs_alone() -> None:
    batcher = Batcher(rows=4, tokens=100)
    batcher.submit(1, [*items(101), *items(1, rows=9), *items(1)])
    assert batches(batcher) == [[(1, 0)], [(1, 2)], [(1, 1)]]


def test_a_large_job_is_packed_by_length() -> None:
    batcher = Batcher(rows=99, tokens=400)
    batcher.submit(1, items(100, 10, 100, 10, 100, 10, 100, 10))
    assert [{index % 2 for _, index in each} for each in batches(batcher)] == [{0}, {1}]


def test_short_ones_of_different_lengths_share_a_batch() -> None:
    batcher = Batcher(rows=99, tokens=400)
    for job, length in enumerate((3, 17, 9, 4)):
        batcher.submit(job, items(length))
    assert len(batches(batcher)) == 1


def test_a_longer_one_joins_if_little_is_padded_for_it() -> None:
    batcher = Batcher(rows=99, tokens=400)
    batcher.submit(1, items(40))
    batcher.submit(2, items(50))
    batcher.submit(3, items(90))
    assert batches(batcher) == [[(1, 0), (2, 0)], [(3, 0)]]


def test_keys_and_kinds_never_mix() -> None:
    batcher = Batcher(rows=99, tokens=400)
    batcher.submit(1, [*items(5), *items(5, key="b"), *items(5)])
    batcher.submit(2, items(5), kind="other")
    batcher.submit(3, items(5, key="b"))
    assert batches(batcher) == [[(1, 2), (1, 0)], [(2, 0)], [(3, 0), (1, 1)]]


def test_an_item_without_a_key_always_runs_alone() -> None:
    batcher = Batcher(rows=99, tokens=400)
    batcher.submit(1, items(5, 5, key=None))
    batcher.submit(2, items(5, key=None))
    assert batches(batcher) == [[(1, 1)], [(2, 0)], [(1, 0)]]


def test_two_thousand_items_do_not_starve_one() -> None:
    batcher = Batcher(rows=16, tokens=512)
    batcher.submit(1, items(*[30] * 2000))
    batcher.next_batch()
    batcher.submit(2, items(400))
    batcher.submit(3, items(30))
    following = [each.job for _ in range(2) for each in batcher.next_batch()]
    assert {2, 3} <= set(following)


def test_what_has_priority_leads_and_others_fill_the_rest() -> None:
    batcher = Batcher(rows=2, tokens=512)
    batcher.submit(1, items(5, 5), priority=Priority.FLEX)
    batcher.submit(2, items(5), priority=Priority.DEFAULT)
    batcher.submit(3, items(5), priority=Priority.PRIORITY)
    assert batches(batcher) == [[(3, 0), (2, 0)], [(1, 1), (1, 0)]]


def test_waiting_lifts_a_job_by_a_priority() -> None:
    batcher = Batcher(rows=1, tokens=512)
    batcher.submit(1, items(5), priority=Priority.FLEX, now=0.0)
    for number in range(2, 5):
        batcher.submit(number, items(5), priority=Priority.PRIORITY, now=2 * AGEING_S - 1)
    assert batcher.next_batch(2 * AGEING_S - 1) == [Place(2, 0)]
    assert batcher.next_batch(2 * AGEING_S) == [Place(1, 0)]


def test_a_job_whose_time_is_up_is_dropped_with_all_its_items() -> None:
    batcher = Batcher(rows=1, tokens=512)
    batcher.submit(1, items(5, 5), deadline=10.0)
    batcher.submit(2, items(5))
    assert batcher.next_batch(9.0) == [Place(1, 1)]
    assert batcher.expire(9.9) == []
    assert batcher.expire(10.0) == [1]
    assert batches(batcher) == [[(2, 0)]]


def test_a_cancelled_job_is_in_no_batch_any_more() -> None:
    batcher = Batcher(rows=1, tokens=512)
    batcher.submit(1, items(5, 5))
    batcher.cancel(1)
    batcher.cancel(1)
    assert batcher.idle


def test_a_job_without_items_or_twice_is_a_mistake() -> None:
    batcher = Batcher(rows=1, tokens=10)
    with pytest.raises(AssertionError, match="has items"):
        batcher.submit(1, [])
    batcher.submit(1, items(1))
    with pytest.raises(AssertionError, match="queued once"):
        batcher.submit(1, items(1))


def padded(groups: list[list[int]]) -> int:
    return sum(max(each) * len(each) for each in groups)


def test_mixed_passages_are_padded_by_a_tenth_at_most_where_order_of_arrival_pads_by_more_than_half() -> None:
    draw = random.Random(1)
    lengths = [draw.randint(8, 256) for _ in range(512)]
    batcher = Batcher(rows=64, tokens=512)
    batcher.submit(1, items(*lengths))
    packed = padded([[lengths[index] for _, index in each] for each in batches(batcher)])
    arrival = padded([lengths[start : start + 32] for start in range(0, len(lengths), 32)])
    assert packed <= 1.1 * sum(lengths)
    assert arrival >= 1.6 * packed


def test_a_batch_closes_at_the_rows_that_are_asked_for_and_the_rest_is_told() -> None:
    batcher = Batcher(rows=4, tokens=100)
    batcher.submit(1, items(*[1] * 7))
    batcher.submit(2, items(1, 1, rows=2))
    assert batcher.rows == 11
    assert len(batcher.next_batch(most_rows=3)) <= 3
    left = batcher.rows
    assert 8 <= left < 11
    batcher.cancel(2)
    assert batcher.rows == sum(len(each) for each in batches(batcher))
    assert batcher.rows == 0


def test_an_item_with_more_rows_than_are_asked_for_runs_alone() -> None:
    batcher = Batcher(rows=8, tokens=100)
    batcher.submit(1, items(1, 1, rows=4))
    assert len(batcher.next_batch(most_rows=2)) == 1
    assert batcher.rows == 4


def test_of_many_small_jobs_those_nearest_in_length_share_a_batch() -> None:
    batcher = Batcher(rows=64, tokens=512)
    for job, length in enumerate([20, 9, 31, 18, 8, 30, 21, 19]):
        batcher.submit(job, items(length))
    batches = [{each.job for each in batcher.next_batch(most_rows=4)} for _ in range(2)]
    assert batches == [{0, 3, 6, 7}, {1, 2, 4, 5}], "the oldest leads, and then the oldest of the rest"
    assert batcher.idle


def test_the_nearest_in_length_do_not_come_before_what_is_more_urgent() -> None:
    batcher = Batcher(rows=64, tokens=512)
    for job, (length, priority) in enumerate([(20, 0), (20, 2), (30, 0), (20, 2)]):
        batcher.submit(job, items(length), priority=Priority(priority))
    assert [each.job for each in batcher.next_batch(most_rows=2)] == [0, 2]
