"""The range allocator against the obvious model: who has each unit."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from appliance.engine.llama.ranges import RangeAllocator


class AllocatorMachine(RuleBasedStateMachine):
    @initialize(size=st.integers(0, 40), granularity=st.integers(1, 4))
    def start(self, size: int, granularity: int) -> None:
        self.ranges = RangeAllocator(size, granularity=granularity)
        self.granularity = granularity
        self.units: list[int | None] = [None] * (size - size % granularity)
        self.starts: list[int] = []

    @rule(length=st.integers(1, 15))
    def take(self, length: int) -> None:
        whole = length + -length % self.granularity
        fitting = [
            at for at in range(len(self.units) - whole + 1) if all(each is None for each in self.units[at : at + whole])
        ]
        start = self.ranges.take(length)
        assert start == min(fitting, default=None)
        if start is not None:
            assert start % self.granularity == 0
            self.units[start : start + whole] = [start] * whole
            self.starts.append(start)

    @precondition(lambda self: self.starts)
    @rule(index=st.integers(0, 100))
    def give_back(self, index: int) -> None:
        start = self.starts.pop(index % len(self.starts))
        self.ranges.give_back(start)
        self.units = [None if each == start else each for each in self.units]
        with pytest.raises(KeyError):
            self.ranges.give_back(start)

    @rule(length=st.integers(-3, 0))
    def take_nothing(self, length: int) -> None:
        with pytest.raises(ValueError, match="length"):
            self.ranges.take(length)

    @invariant()
    def books_agree(self) -> None:
        self.ranges.check_integrity()
        assert self.ranges.free == self.units.count(None)


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_damaged_book_is_noticed() -> None:
    ranges = RangeAllocator(10)
    ranges.take(4)
    ranges._taken[0] = 5
    with pytest.raises(AssertionError, match="overlap at 4"):
        ranges.check_integrity()
