"""When a model that failed is asked again."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.engine.onnx.circuit import Circuit, State

FAILURES, OPEN_S = 3, 30.0


class Breaking(RuleBasedStateMachine):
    """A model works and fails as it likes, and trials are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.circuit = Circuit(failures=FAILURES, open_s=OPEN_S)
        self.now = 0.0
        self.in_a_row = 0
        self.trials = 0

    @rule(seconds=st.integers(0, 40))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def request(self) -> None:
        refused = self.circuit.refuses(self.now)
        before = self.circuit.state
        assert self.circuit.admit(self.now) is not refused
        if before is State.OPEN and not refused:
            assert self.circuit.on_trial

    @rule()
    def success(self) -> None:
        self.circuit.succeeded()
        self.in_a_row = 0

    @rule()
    def failure(self) -> None:
        self.circuit.failed(self.now)
        self.in_a_row += 1
        if self.in_a_row >= FAILURES:
            assert self.circuit.state is State.OPEN
            assert self.circuit.refuses(self.now)
            assert not self.circuit.refuses(self.now + OPEN_S)

    @precondition(lambda self: self.circuit.on_trial)
    @rule()
    def lose_the_trial(self) -> None:
        self.circuit.abandon()
        assert not self.circuit.refuses(self.now)

    @invariant()
    def it_is_closed_as_long_as_too_few_failed_in_a_row(self) -> None:
        assert (self.circuit.state is State.CLOSED) == (self.in_a_row < FAILURES)
        assert 0 <= self.circuit.retry_after(self.now) <= OPEN_S


TestBreaking = Breaking.TestCase


def opened() -> Circuit:
    circuit = Circuit(failures=2, open_s=10.0)
    circuit.failed(0.0)
    circuit.failed(1.0)
    return circuit


def test_it_opens_after_failures_in_a_row_and_not_before() -> None:
    circuit = Circuit(failures=2, open_s=10.0)
    circuit.failed(0.0)
    circuit.succeeded()
    circuit.failed(0.0)
    assert circuit.admit(0.0)
    circuit.failed(1.0)
    assert not circuit.admit(10.9)
    assert circuit.retry_after(10.0) == 1.0


def test_half_open_admits_one_and_its_success_closes() -> None:
    circuit = opened()
    assert circuit.admit(11.0)
    assert circuit.on_trial
    assert not circuit.admit(11.0)
    circuit.succeeded()
    assert circuit.admit(11.0)
    assert not circuit.on_trial


def test_a_trial_that_fails_opens_again() -> None:
    circuit = opened()
    assert circuit.admit(11.0)
    circuit.failed(12.0)
    assert circuit.refuses(21.9)
    assert circuit.admit(22.0)


def test_a_trial_that_was_never_run_leaves_its_place_to_the_next() -> None:
    circuit = opened()
    assert circuit.admit(11.0)
    circuit.abandon()
    assert circuit.admit(11.0)


def test_without_a_trial_there_is_nothing_to_abandon() -> None:
    circuit = opened()
    circuit.abandon()
    assert circuit.refuses(5.0)
