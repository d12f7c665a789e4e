"""Turns between adapters: nobody starves, nobody gains by coming and going, and switching stays cheap."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.engine.llama.turns import SWITCHES_PER_TURN, Turns

ADAPTERS = ["", "a", "b", "c"]


def serve(
    subject: Turns,
    adapters: list[str],
    steps: int,
    target_s: float = 0.001,
    *,
    step_s: float = 0.01,
    switch_s: float = 0.0,
) -> list[str]:
    """Let everybody have work for some steps; return whose each was."""
    served = []
    for _ in range(steps):
        adapter = subject.next(adapters, target_s)
        subject.served(adapter, step_s + (switch_s if adapter != subject.current else 0.0), step_s)
        served.append(adapter)
    return served


def test_one_alone_never_waits() -> None:
    subject = Turns()
    assert set(serve(subject, ["a"], 50)) == {"a"}
    assert set(serve(subject, [""], 50)) == {""}


def test_turns_are_as_long_as_lets_everyone_come_round_within_the_target() -> None:
    assert "".join(serve(Turns(), ["a", "b", "c"], 12, target_s=0.06)) == "aabbccaabbcc"


def test_where_a_step_is_longer_than_the_share_every_turn_is_one_step() -> None:
    assert "".join(serve(Turns(), ["a", "b", "c"], 6)) == "abcabc"


def test_a_costly_switch_makes_turns_longer() -> None:
    subject = Turns()
    served = serve(subject, ["a", "b"], 400, 0.1, step_s=0.01, switch_s=0.02)
    assert subject.switch_s == pytest.approx(0.02, rel=0.01)
    switches = sum(one != other for one, other in pairwise(served))
    assert switches * 0.02 <= (400 * 0.01 + switches * 0.02) / (SWITCHES_PER_TURN - 1)
    assert subject.share_s(2, 0.1) == pytest.approx(0.08, rel=0.01)


def test_one_switch_that_took_forever_makes_no_turn_longer_than_the_target() -> None:
    subject = Turns()
    serve(subject, ["a", "b"], 2, 0.1, switch_s=60.0)
    assert subject.share_s(2, 0.1) == 0.1


def test_who_worked_alone_for_long_makes_way_for_a_newcomer_at_once() -> None:
    subject = Turns()
    serve(subject, ["a"], 2000)
    assert subject.next(["a", "b"], 10.0) == "b"


def test_coming_and_going_gains_nothing() -> None:
    subject = Turns()
    served = []
    for step in range(30):
        with_work = ["a", "b"] if step % 2 else ["a", "b", "c"]
        served += serve(subject, with_work, 1)
    assert served.count("c") <= served.count("a") <= served.count("b") + 1


def test_a_forgotten_adapter_comes_back_as_a_newcomer() -> None:
    subject = Turns()
    serve(subject, ["a", "b"], 4)
    subject.forget("b")
    subject.forget("never loaded")
    assert subject.next(["a", "b"], 0.001) == "b"


def test_without_work_there_is_no_turn() -> None:
    with pytest.raises(ValueError, match="empty"):
        Turns().next([], 0.1)


@given(st.sets(st.sampled_from(ADAPTERS), min_size=1), st.integers(1, 40), st.floats(0.001, 1), st.floats(0, 0.1))
def test_asking_changes_nothing_and_the_answer_has_work(
    adapters: set[str], steps: int, step_s: float, switch_s: float
) -> None:
    subject = Turns()
    serve(subject, sorted(adapters), steps, 0.15, step_s=step_s, switch_s=switch_s)
    first = subject.next(adapters, 0.15)
    assert first in adapters
    assert subject.next(adapters, 0.15) == first


class TurnsMachine(RuleBasedStateMachine):
    """Adapters gain and lose work at any time; steps take any time."""

    def __init__(self) -> None:
        super().__init__()
        self.subject = Turns()
        self.with_work: set[str] = set()
        self.turns_waited: dict[str, dict[str, int]] = {}
        """For each adapter that has work, how many turns every other has begun since its own last one."""
        self.turn_s = 0.0

    @rule(adapter=st.sampled_from(ADAPTERS))
    def gain_work(self, adapter: str) -> None:
        if adapter not in self.with_work:
            self.with_work.add(adapter)
            self.turns_waited[adapter] = {}

    @precondition(lambda self: self.with_work)
    @rule(data=st.data())
    def lose_work(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(sorted(self.with_work)))
        self.with_work.remove(gone)
        del self.turns_waited[gone]

    @precondition(lambda self: self.with_work)
    @rule(step_s=st.floats(0.001, 0.5), switch_s=st.floats(0, 0.05))
    def step(self, step_s: float, switch_s: float) -> None:
        before, others_waited = self.subject.current, len(self.with_work) > 1
        adapter = self.subject.next(self.with_work, 0.15)
        if adapter != before:
            self.turn_s = 0.0
            for other, waited in self.turns_waited.items():
                if other != adapter:
                    waited[adapter] = waited.get(adapter, 0) + 1
        elif others_waited:
            assert self.turn_s < self.subject.share_s(len(self.with_work), 0.15), "a turn went on beyond its share"
        self.turns_waited[adapter] = {}
        seconds = step_s + (switch_s if adapter != before else 0.0)
        self.subject.served(adapter, seconds, step_s)
        self.turn_s += seconds
        assert self.subject.current == adapter

    @invariant()
    def nobody_has_two_turns_while_another_waits(self) -> None:
        for waited in self.turns_waited.values():
            assert all(count <= 1 for count in waited.values())

    @invariant()
    def the_cost_of_a_switch_is_within_what_was_measured(self) -> None:
        assert 0.0 <= self.subject.switch_s <= 0.05 + 1e-9


TestTurnsMachine = TurnsMachine.TestCase
TestTurnsMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
