"""The scheduler as a state machine: whatever arrives or leaves, its books stay true and everybody is served."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.core.types import Priority
from appliance.engine.llama.prefix import common_prefix
from appliance.engine.llama.scheduler import Scheduler
from appliance.engine.llama.step import Fork, Limits, Sequence, Step, Truncate


def sequence(number: int, tokens: list[int], priority: Priority = Priority.DEFAULT, arrived: float = 0.0) -> Sequence:
    return Sequence(number, array("i", tokens), priority, arrived)


def scheduler(
    *, cells: int = 256, slots: int = 4, batch: int = 16, latency: float = 1.0, rewind: bool = True
) -> Scheduler:
    return Scheduler(Limits(cells, slots, batch, latency, can_rewind=rewind))


def work(subject: Scheduler, seconds: float = 0.01) -> Step:
    """Plan and decode one step, sampling token 7 for everyone whose turn it is."""
    step = subject.plan()
    subject.complete(step, seconds)
    for run in step.runs:
        if run.sample:
            subject.append(run.sequence, 7)
    subject.check_integrity()
    return step


def prefill(subject: Scheduler, newcomer: Sequence) -> Step:
    """Submit a sequence and work until its first token is sampled; returns the first step."""
    subject.submit(newcomer)
    first = work(subject)
    for _ in range(100):
        if len(newcomer.tokens) > newcomer.prompt_length:
            return first
        work(subject)
    raise AssertionError("the prompt was never read")


def test_a_prompt_longer_than_a_batch_is_read_in_chunks_and_sampled_once() -> None:
    subject = scheduler()
    subject.submit(sequence(1, list(range(40))))
    counts = [(run.count, run.sample) for _ in range(3) for run in work(subject).runs]
    assert counts == [(16, False), (16, False), (8, True)]


def test_prefill_is_cut_to_the_target_latency_while_someone_decodes() -> None:
    subject = scheduler(cells=1000, batch=512, latency=0.1)
    prefill(subject, sequence(1, [1, 2, 3]))
    for prompt_tokens in (10, 40, 20, 80) * 40:
        subject.cost.observe(decoding=1, prefill_tokens=prompt_tokens, seconds=0.04 + 0.002 * prompt_tokens)
    subject.submit(sequence(2, list(range(600))))
    step = subject.plan()
    assert step.decoding == 1
    assert 28 <= step.prefill_tokens <= 32  # (0.1 - 0.04) / 0.002
    subject.complete(step, 0.1)
    subject.cancel(step.runs[0].sequence)
    assert subject.plan().prefill_tokens == 512


def test_a_slow_machine_still_advances_prompts() -> None:
    subject = scheduler(latency=0.001)
    prefill(subject, sequence(1, [1, 2, 3]))
    subject.submit(sequence(2, list(range(30))))
    assert subject.plan().prefill_tokens == 8


def test_the_oldest_prompt_advances_beside_shorter_ones() -> None:
    subject = scheduler(cells=256)
    long, short = sequence(1, list(range(60))), sequence(2, list(range(100, 112)))
    subject.submit(long)
    subject.submit(short)
    assert {run.sequence.id: run.count for run in subject.plan().runs} == {1: 4, 2: 12}


def test_the_next_turn_reuses_its_own_past_in_place() -> None:
    subject = scheduler()
    first = sequence(1, list(range(20)))
    prefill(subject, first)
    subject.finish(first)
    second = sequence(2, [*range(20), 50, 51])
    step = prefill(subject, second)
    assert second.cached == 20
    assert step.operations == ()
    assert [run.count for run in step.runs] == [2]


def test_a_fully_cached_prompt_steps_back_one_token_to_have_logits() -> None:
    subject = scheduler()
    first = sequence(1, list(range(20)))
    prefill(subject, first)
    subject.finish(first)
    second = sequence(2, list(range(20)))
    step = prefill(subject, second)
    assert second.cached == 19
    assert step.operations == (Truncate(0, 19),)
    assert [(run.start, run.count) for run in step.runs] == [(19, 1)]


def test_a_prefix_of_a_running_sequence_is_forked_without_new_cells() -> None:
    subject = scheduler()
    prefill(subject, sequence(1, list(range(20))))
    used = subject.ledger.used
    other = sequence(2, [*range(18), 60])
    subject.submit(other)
    step = subject.plan()
    assert step.operations == (Fork(0, 1, 18),)
    assert other.cached == 18
    assert subject.ledger.used == used


def test_a_common_prompt_that_arrives_twice_at_once_is_read_once() -> None:
    subject = scheduler(cells=512, batch=64)
    shared = list(range(192))
    both = [sequence(1, [*shared, 300]), sequence(2, [*shared, 301])]
    for each in both:
        subject.submit(each)
    steps = [work(subject) for _ in range(6)]
    assert sum(step.prefill_tokens for step in steps) == 194
    assert both[1].cached == 192


def test_a_short_shared_part_is_kept_and_the_longer_past_of_another_conversation_too() -> None:
    subject = scheduler(cells=256, batch=64)
    first = sequence(1, list(range(40)))
    prefill(subject, first)
    subject.finish(first)
    prefill(subject, sequence(2, [*range(10), *range(100, 120)]))
    assert subject.ledger.length(0) == 40


def test_a_memory_that_cannot_rewind_reuses_only_a_whole_past() -> None:
    subject = scheduler(cells=256, batch=64, rewind=False)
    first = sequence(1, list(range(20)))
    prefill(subject, first)
    subject.finish(first)
    branch, same = sequence(2, [*range(10), 90, 91]), sequence(3, [*range(20), 70])
    prefill(subject, branch)
    prefill(subject, same)
    assert (branch.cached, same.cached) == (0, 20)


def test_idle_pasts_are_dropped_oldest_first_before_anyone_gives_way() -> None:
    subject = scheduler(cells=48, batch=64)
    for number in (1, 2):
        each = sequence(number, list(range(number * 100, number * 100 + 20)))
        prefill(subject, each)
        subject.finish(each)
    third = sequence(3, list(range(300, 325)))
    prefill(subject, third)
    assert subject.preemptions == 0
    assert [subject.ledger.length(slot) for slot in range(3)] == [0, 20, 25]


def test_the_last_in_order_gives_way_and_finishes_later_without_losing_a_token() -> None:
    subject = scheduler(cells=80, batch=64)
    old, young = sequence(1, list(range(20))), sequence(2, list(range(100, 120)), arrived=1.0)
    subject.submit(old)
    subject.submit(young)
    while subject.preemptions == 0:
        work(subject)
    written = list(young.tokens)
    assert young in subject.waiting
    while old.slot is not None and len(old.tokens) < 75:
        work(subject)
    subject.finish(old)
    work(subject)
    assert list(young.tokens[: len(written)]) == written
    assert len(young.tokens) == len(written) + 1


def test_native_refusal_drops_idle_pasts_then_the_youngest_then_gives_up() -> None:
    subject = scheduler()
    finished = sequence(1, list(range(20)))
    prefill(subject, finished)
    subject.finish(finished)
    for number in (2, 3):
        subject.submit(sequence(number, [number] * 5, arrived=float(number)))
    subject.plan()
    subject.refuse()
    assert subject.ledger.length(0) == 0
    assert [each.id for each in subject.running] == [2, 3]
    subject.refuse()
    assert [each.id for each in subject.running] == [2]
    with pytest.raises(ValueError, match="does not fit"):
        subject.refuse()


def test_a_sequence_that_was_not_ended_in_time_is_an_error_and_no_endless_loop() -> None:
    subject = scheduler(cells=32, batch=64)
    endless = sequence(1, list(range(30)))
    prefill(subject, endless)
    for _ in range(2):
        work(subject)
    with pytest.raises(ValueError, match="does not fit"):
        work(subject)


def test_a_dropped_sequence_leaves_nothing_to_reuse() -> None:
    subject = scheduler()
    broken = sequence(1, list(range(20)))
    prefill(subject, broken)
    subject.drop(broken)
    again = sequence(2, list(range(20)))
    step = prefill(subject, again)
    assert again.cached == 0
    assert Truncate(0, 0) in step.operations


def test_a_large_prompt_is_not_overtaken_forever_by_small_ones() -> None:
    subject = scheduler(cells=64, batch=64)
    running = sequence(1, list(range(30)))
    prefill(subject, running)
    large, small = sequence(2, list(range(100, 150)), arrived=1.0), sequence(3, [200, 201], arrived=2.0)
    subject.submit(large)
    subject.submit(small)
    work(subject)
    assert subject.waiting == [large, small]
    subject.finish(running)
    assert large in [run.sequence for run in work(subject).runs]


@pytest.mark.parametrize(
    ("tier", "arrived", "first"),
    [(Priority.PRIORITY, 19.0, 2), (Priority.PRIORITY, 21.0, 1), (Priority.FLEX, 0.0, 1), (Priority.DEFAULT, 1.0, 1)],
)
def test_tiers_are_head_starts_so_that_waiting_long_enough_wins(tier: Priority, arrived: float, first: int) -> None:
    subject = scheduler(slots=1)
    subject.submit(sequence(1, [1, 2]))
    subject.submit(sequence(2, [3, 4], tier, arrived))
    assert subject.plan().runs[0].sequence.id == first


@pytest.mark.parametrize("tokens", [0, 64, 65])
def test_what_cannot_fit_is_refused_at_once(tokens: int) -> None:
    subject = scheduler(cells=64)
    with pytest.raises(ValueError, match="do not fit"):
        subject.submit(sequence(1, [1] * tokens))
    assert subject.idle


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40))
def test_the_common_prefix_is_the_obvious_one(left: list[int], right: list[int], limit: int) -> None:
    expected = 0
    for a, b in zip(left[:limit], right[:limit], strict=False):
        if a != b:
            break
        expected += 1
    assert common_prefix(array("i", left), array("i", right), limit) == expected


class NativeMemory:
    """What llama.cpp would hold: for each slot the token at each position. Cells are shared objects."""

    def __init__(self, slots: int) -> None:
        self.slots: list[list[list[int]]] = [[] for _ in range(slots)]

    def apply(self, step: Step) -> None:
        for operation in step.operations:
            if isinstance(operation, Truncate):
                del self.slots[operation.slot][operation.length :]
            else:
                assert self.slots[operation.target] == []
                self.slots[operation.target] = self.slots[operation.source][: operation.length]
        for run in step.runs:
            slot = run.sequence.slot
            assert slot is not None
            assert len(self.slots[slot]) == run.start, "positions must be consecutive"
            self.slots[slot] += [[token] for token in run.sequence.tokens[run.start : run.start + run.count]]

    @property
    def cells(self) -> int:
        return len({id(cell) for slot in self.slots for cell in slot})


class SchedulerMachine(RuleBasedStateMachine):
    """Random traffic on few cells, against a model of native memory."""

    def __init__(self) -> None:
        super().__init__()
        self.subject = scheduler(cells=48, slots=3, batch=16, latency=0.05)
        self.memory = NativeMemory(3)
        self.alive: list[Sequence] = []
        self.number = 0
        self.now = 0.0

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 40),
        tail=st.lists(st.integers(0, 9), max_size=6),
        tier=st.sampled_from(Priority),
    )
    def submit(self, family: int, length: int, tail: list[int], tier: Priority) -> None:
        self.number += 1
        tokens = [family * 100 + index for index in range(length)] + tail
        new = sequence(self.number, tokens, tier, self.now)
        self.subject.submit(new)
        self.alive.append(new)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.alive))
        self.subject.cancel(gone)
        self.alive.remove(gone)
        self.subject.cancel(gone)

    @rule(seconds=st.floats(0.001, 0.2), token=st.integers(0, 9))
    def step(self, seconds: float, token: int) -> None:
        step = self.subject.plan()
        self.now += seconds
        self.memory.apply(step)
        self.subject.complete(step, seconds)
        assert step.runs or not self.alive, "there is work, but nothing runs"
        assert sum(run.count for run in step.runs) <= 16
        for run in step.runs:
            if run.sample:
                self.subject.append(run.sequence, token)
                if len(run.sequence.tokens) >= 47:
                    self.subject.finish(run.sequence)
                    self.alive.remove(run.sequence)

    @precondition(lambda self: len(self.subject.running) > 1)
    @rule()
    def native_refusal(self) -> None:
        self.memory.apply(Step(self.subject.plan().operations, (), ()))
        if len(self.subject.running) > 1:
            self.subject.refuse()

    @invariant()
    def books_are_true(self) -> None:
        self.subject.check_integrity()
        assert self.subject.ledger.used <= 48
        assert set(self.alive) == set(self.subject.waiting) | set(self.subject.running)

    @invariant()
    def every_slot_holds_what_the_scheduler_believes(self) -> None:
        pending: dict[int, int] = {}
        for operation in self.subject._operations:
            slot = operation.slot if isinstance(operation, Truncate) else operation.target
            pending[slot] = 1
        for each in self.subject.running:
            assert each.slot is not None
            if each.slot not in pending:
                held = [cell[0] for cell in self.memory.slots[each.slot]]
                assert held == list(each.tokens[: each.evaluated])
        if not pending:
            assert self.memory.cells == self.subject.ledger.used

    def teardown(self) -> None:
        """Everybody left is served to the end within a bounded number of steps."""
        for _ in range(200):
            if not self.alive:
                break
            step = self.subject.plan()
            self.memory.apply(step)
            self.subject.complete(step, 0.01)
            for run in step.runs:
                if run.sample:
                    self.subject.finish(run.sequence)
                    self.alive.remove(run.sequence)
        assert not self.alive, "somebody was never served"


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
