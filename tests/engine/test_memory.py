"""What is reused of each kind of memory, as policy: no native code."""

from __future__ import annotations

from array import array

import pytest

from appliance.engine.llama.memory import MemoryKind
from appliance.engine.llama.scheduler import Scheduler
from appliance.engine.llama.step import Fork, Limits, Sequence, Step, Truncate


@pytest.mark.parametrize(
    ("kind", "slots", "states"),
    [
        (MemoryKind(), True, True),
        (MemoryKind(window=16), True, False),
        (MemoryKind(recurrent=True), False, False),
        (MemoryKind(window=16, recurrent=True), False, False),
    ],
)
def test_what_can_be_cut_back_depends_on_the_kind(kind: MemoryKind, slots: bool, states: bool) -> None:
    assert kind.can_rewind == slots
    assert kind.can_rewind_states == states


@pytest.mark.parametrize(
    ("kind", "held", "shortest"),
    [
        (MemoryKind(), range(100), 0),
        (MemoryKind(window=16), range(100), 0),
        (MemoryKind(window=16), range(1, 100), 16),
        (MemoryKind(window=16), range(84, 100), 99),  # as loaded: the window before the last token is there
        (MemoryKind(window=16), range(85, 100), 100),
        (MemoryKind(window=16), range(90, 100), 100),
        (MemoryKind(recurrent=True), range(99, 100), 100),
        (MemoryKind(window=16, recurrent=True), range(99, 100), 100),
        (MemoryKind(recurrent=True), range(0), 0),
    ],
)
def test_the_window_before_the_next_token_must_be_held(kind: MemoryKind, held: range, shortest: int) -> None:
    assert kind.shortest(held) == shortest


class WindowedMemory:
    """A scheduler over a memory with a sliding window, of which anything may be lost at any time."""

    def __init__(self, *, cells: int = 512, slots: int = 4) -> None:
        self.shortest = dict.fromkeys(range(slots), 0)
        limits = Limits(cells, slots, 64, 1.0, can_rewind_states=False)
        self.scheduler = Scheduler(limits, shortest=self.shortest.__getitem__)

    def submit(self, number: int, tokens: list[int]) -> Sequence:
        sequence = Sequence(number, array("i", tokens))
        self.scheduler.submit(sequence)
        return sequence

    def work(self) -> Step:
        step = self.scheduler.plan()
        self.scheduler.complete(step, 0.01)
        for run in step.runs:
            if run.sample:
                self.scheduler.append(run.sequence, 7)
        self.scheduler.check_integrity()
        return step

    def past(self, number: int, tokens: list[int]) -> None:
        """Leave a past behind in an idle slot."""
        sequence = self.submit(number, tokens)
        while len(sequence.tokens) == len(tokens):
            self.work()
        self.scheduler.finish(sequence)


def test_a_prefix_whose_window_was_overwritten_is_read_again() -> None:
    memory = WindowedMemory()
    memory.past(1, list(range(60)))
    memory.shortest[0] = 31
    newcomer = memory.submit(2, [*range(30), 100])
    assert memory.work().operations == ()
    assert newcomer.cached == 0


def test_a_prefix_whose_window_is_held_is_shared() -> None:
    memory = WindowedMemory()
    memory.past(1, list(range(60)))
    memory.shortest[0] = 30
    newcomer = memory.submit(2, [*range(30), 100])
    assert memory.work().operations == (Truncate(0, 30),)
    assert newcomer.cached == 30


def test_a_shorter_prefix_that_is_held_is_better_than_a_longer_one_that_is_not() -> None:
    memory = WindowedMemory()
    memory.past(1, list(range(60)))
    memory.shortest[0] = 55
    memory.past(2, [*range(40), *range(200, 230)])
    newcomer = memory.submit(3, [*range(50), 100])
    assert memory.work().operations == (Truncate(1, 40),)
    assert newcomer.cached == 40


def test_a_slot_that_is_about_to_change_lends_nothing_before_the_next_step() -> None:
    memory = WindowedMemory()
    memory.past(1, list(range(60)))
    first, second = memory.submit(2, [*range(50), 100]), memory.submit(3, [*range(50), 101])
    step = memory.work()
    assert step.operations == (Truncate(0, 50),)
    assert (first.cached, second.cached) == (50, 0)


def test_nobody_waits_for_a_prefix_that_a_running_sequence_has_read_and_lost() -> None:
    memory = WindowedMemory()
    first = memory.submit(1, list(range(100)))
    memory.work()
    second = memory.submit(2, [*range(60), 300, 301])
    memory.shortest[0] = 64
    step = memory.work()
    assert second in [run.sequence for run in step.runs]
    assert (first.cached, second.cached) == (0, 0)


def test_a_sequence_whose_past_turns_out_to_be_lost_begins_again() -> None:
    memory = WindowedMemory()
    memory.past(1, list(range(60)))
    memory.past(2, list(range(200, 260)))
    newcomer = memory.submit(3, [*range(20), 100])
    assert memory.scheduler.plan().operations == (Fork(0, 2, 20),)
    memory.scheduler.lost(newcomer)
    memory.shortest[0] = 60
    step = memory.work()
    assert [(run.start, run.count) for run in step.runs] == [(0, 21)]
    assert newcomer.cached == 0
