"""Who is embedded with whom: everything once, within the budget, in turns, and nobody starves."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.engine.llama_embedding.batcher import Batcher, Item

TOKENS, INPUTS = 64, 5


class Batching(RuleBasedStateMachine):
    """Jobs come and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.batcher = Batcher(tokens=TOKENS, inputs=INPUTS)
        self.waiting: dict[int, list[int]] = {}
        self.taken: dict[int, int] = {}
        self.jobs = 0

    @rule(lengths=st.lists(st.integers(1, 2 * TOKENS), min_size=1, max_size=12))
    def submit(self, lengths: list[int]) -> None:
        self.jobs += 1
        self.batcher.submit(self.jobs, lengths)
        self.waiting[self.jobs] = lengths
        self.taken[self.jobs] = 0

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.waiting)))
        self.batcher.cancel(job)
        self.batcher.cancel(job)
        del self.waiting[job]

    @rule()
    def take_a_batch(self) -> None:
        self._take()

    @rule()
    def nobody_waits_for_more_batches_than_there_are_others(self) -> None:
        first = list(self.waiting)
        unserved = set(first)
        for _ in first:
            unserved -= {each.job for each in self._take()}
        assert not unserved & set(first)

    def _take(self) -> list[Item]:
        batch = self.batcher.next_batch()
        assert bool(batch) == bool(self.waiting)
        assert len(batch) <= INPUTS
        assert len(batch) == 1 or sum(each.tokens for each in batch) <= TOKENS
        for each in batch:
            lengths = self.waiting[each.job]  # of a job that was cancelled or is through there is nothing
            assert each == Item(each.job, self.taken[each.job], lengths[each.index])
            self.taken[each.job] += 1
            if self.taken[each.job] == len(lengths):
                del self.waiting[each.job]
        return batch

    @invariant()
    def it_is_idle_when_nothing_waits(self) -> None:
        assert self.batcher.idle == (not self.waiting)


TestBatching = Batching.TestCase


def batches(batcher: Batcher) -> list[list[tuple[int, int]]]:
    found = []
    while not batcher.idle:
        found.append([(each.job, each.index) for each in batcher.next_batch()])
    return found


def test_jobs_take_turns_so_a_large_one_does_not_hold_up_a_small_one() -> None:
    batcher = Batcher(tokens=30, inputs=99)
    batcher.submit(1, [10] * 5)
    batcher.submit(2, [10])
    assert batches(batcher) == [[(1, 0), (2, 0), (1, 1)], [(1, 2), (1, 3), (1, 4)]]


def test_an_input_longer_than_a_batch_goes_alone_and_those_that_fit_go_before() -> None:
    batcher = Batcher(tokens=30, inputs=99)
    batcher.submit(1, [10, 10])
    batcher.submit(2, [31])
    batcher.submit(3, [20])
    assert batches(batcher) == [[(1, 0), (3, 0)], [(2, 0)], [(1, 1)]]


def test_a_batch_closes_at_its_number_of_inputs() -> None:
    batcher = Batcher(tokens=1000, inputs=2)
    batcher.submit(1, [1, 1, 1])
    assert batches(batcher) == [[(1, 0), (1, 1)], [(1, 2)]]


def test_a_job_without_inputs_or_twice_is_a_mistake() -> None:
    batcher = Batcher(tokens=10, inputs=2)
    with pytest.raises(AssertionError, match="has inputs"):
        batcher.submit(1, [])
    batcher.submit(1, [1])
    with pytest.raises(AssertionError, match="queued once"):
        batcher.submit(1, [1])
