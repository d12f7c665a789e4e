"""The life of a batch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from appliance.batches.states import UNFINISHED, Event, State, after
from appliance.core.batches import BatchStatus

ENDED: tuple[BatchStatus, ...] = ("completed", "failed", "expired", "cancelled")


def through(*events: Event) -> State:
    state = State()
    for event in events:
        state = after(state, event) or state
    return state


def test_a_batch_goes_its_way_to_the_end() -> None:
    assert through() == State("validating")
    assert through(Event.VALIDATED) == State("in_progress")
    assert through(Event.VALIDATED, Event.WORKED_OFF) == State("finalizing", "completed")
    assert through(Event.VALIDATED, Event.WORKED_OFF, Event.WRITTEN) == State("completed")


def test_every_other_end_comes_after_the_output_is_written() -> None:
    assert through(Event.REFUSED) == State("failed")
    assert through(Event.BREAK) == State("failed")
    for before in ((), (Event.VALIDATED,)):
        assert through(*before, Event.CANCEL) == State("cancelling", "cancelled")
        assert through(*before, Event.CANCEL, Event.WRITTEN) == State("cancelled")
        assert through(*before, Event.EXPIRE) == State("finalizing", "expired")
        assert through(*before, Event.EXPIRE, Event.WRITTEN) == State("expired")
    assert through(Event.VALIDATED, Event.BREAK) == State("finalizing", "failed")
    assert through(Event.VALIDATED, Event.BREAK, Event.WRITTEN) == State("failed")


def test_what_cannot_be_written_fails() -> None:
    assert through(Event.VALIDATED, Event.WORKED_OFF, Event.BREAK) == State("failed")
    assert through(Event.CANCEL, Event.BREAK) == State("failed")


def test_a_cancelled_batch_stays_so_whatever_comes_too_late() -> None:
    for late in (Event.VALIDATED, Event.REFUSED, Event.WORKED_OFF, Event.EXPIRE, Event.CANCEL):
        assert through(Event.VALIDATED, Event.CANCEL, late, Event.WRITTEN) == State("cancelled")


def test_nothing_is_written_of_a_batch_that_runs() -> None:
    assert after(State(), Event.WRITTEN) is None
    assert after(State("in_progress"), Event.WRITTEN) is None
    assert after(State("finalizing", "completed"), Event.CANCEL) is None


@given(st.sampled_from(ENDED), st.sampled_from(Event))
def test_an_end_is_final(status: BatchStatus, event: Event) -> None:
    assert after(State(status), event) is None


class Life(RuleBasedStateMachine):
    """Any events in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State()
        self.seen = [self.state.status]

    @rule(event=st.sampled_from(Event))
    def happen(self, event: Event) -> None:
        following = after(self.state, event)
        if following is None or following == self.state:
            return
        assert self.state.status in UNFINISHED
        self.state = following
        self.seen.append(following.status)

    @invariant()
    def no_status_comes_twice_and_the_outcome_is_kept(self) -> None:
        assert len(set(self.seen)) == len(self.seen)
        assert (self.state.outcome is not None) == (self.state.status in ("finalizing", "cancelling"))
        assert self.state.outcome is None or self.state.outcome in ENDED
        assert self.seen[0] == "validating"
        if "completed" in self.seen:
            assert self.seen == ["validating", "in_progress", "finalizing", "completed"]
        if "cancelled" in self.seen:
            assert self.seen[-2:] == ["cancelling", "cancelled"]


TestLife = Life.TestCase
