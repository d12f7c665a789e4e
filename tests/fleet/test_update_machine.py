"""The life of an update: each state with what is due in it, and every event in every state."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from appliance.core.fleet import FINAL_STATES, JobState
from appliance.fleet.update_machine import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    MOST_DAMAGES,
    Canceled,
    Damaged,
    Done,
    Event,
    Refused,
    RolledBack,
    Stumbled,
    Update,
    after,
    canceling,
    due,
    expire,
    supersedes,
)

NEW = Update("job-1", 7)
CANCEL = Canceled("canceled", "somebody said so")
BEFORE_TRIAL: tuple[JobState, ...] = ("seen", "verified", "reserved", "fetching", "fetched", "staged", "testing")
ORDER: tuple[JobState, ...] = (*BEFORE_TRIAL, "trial", "confirmed")
EFFECTS = ("verify", "reserve", "begin_fetch", "fetch", "stage", "begin_test", "test")


def at(state: JobState, **more: object) -> Update:
    return replace(NEW, state=state, **more)  # type: ignore[arg-type]


def test_an_update_goes_through_its_states_in_order() -> None:
    update, seen, effects = NEW, [NEW.state], []
    while not update.over:
        effects.append(due(update, 0.0)[0])
        update = after(update, Done())
        if update.state != seen[-1]:
            seen.append(update.state)
    assert tuple(seen) == ORDER
    assert effects == [*EFFECTS, "activate", "settle"]
    assert due(update, 0.0) == ("none", 0.0)


@pytest.mark.parametrize("state", BEFORE_TRIAL)
def test_a_cancel_before_the_trial_tidies_up_and_then_is_final(state: JobState) -> None:
    ending = after(at(state), CANCEL)
    assert (ending.state, ending.ending, ending.code) == (state, "canceled", "canceled")
    assert due(ending, 0.0)[0] == "discard"
    assert after(ending, Done()).state == "canceled"


@pytest.mark.parametrize("soaking", [False, True])
def test_a_cancel_in_the_trial_goes_back_first(soaking: bool) -> None:
    ending = after(at("trial", soaking=soaking), CANCEL)
    assert due(ending, 0.0)[0] == "roll_back"
    assert after(ending, Done()).state == "canceled"


@pytest.mark.parametrize("state", sorted(FINAL_STATES))
@pytest.mark.parametrize(
    "event", [Done(), CANCEL, Refused("a", "b"), Stumbled("a", "b", 1.0), Damaged("a"), RolledBack("a", "b")]
)
def test_what_is_over_stays_as_it_is(state: JobState, event: Event) -> None:
    assert after(at(state), event) == at(state)
    assert expire(at(state, expires=1.0), 2.0) == at(state, expires=1.0)


@pytest.mark.parametrize("state", BEFORE_TRIAL)
def test_what_can_never_work_ends_the_update_and_is_not_tried_again(state: JobState) -> None:
    ending = after(at(state), Refused("gone", "the hub has it no more"))
    assert ending.ending == ("rejected" if state == "seen" else "failed")
    final = after(ending, Done())
    assert (final.state, final.code) == (ending.ending, "gone")


def test_what_may_pass_is_tried_again_after_growing_pauses_and_the_count_begins_anew_after_success() -> None:
    update, now, pauses = at("fetching"), 1000.0, []
    for _ in range(12):
        update = after(update, Stumbled("unreachable", "no hub", now))
        assert due(update, now) == ("wait", update.retry_at)
        pauses.append(update.retry_at - now)
        now = update.retry_at
        assert due(update, now)[0] == "fetch"
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert max(pauses) == LONGEST_PAUSE_S
    assert (update.failures, update.code) == (12, "unreachable")
    done = after(update, Done())
    assert (done.failures, done.retry_at, done.code) == (0, 0.0, "")
    assert after(at("fetching"), Stumbled("a", "b", 0.0, spread=0.5)).retry_at == FIRST_PAUSE_S / 2


@pytest.mark.parametrize("state", BEFORE_TRIAL)
def test_a_job_expires_before_its_trial_and_says_what_the_trouble_was(state: JobState) -> None:
    update = at(state, expires=100.0)
    assert expire(update, 99.0) == update
    assert expire(at(state), 1e12) == at(state)  # 0 is never
    ended = expire(update, 100.0)
    assert (ended.ending, ended.code) == ("failed", "expired")
    assert "disk_full" in expire(replace(update, code="disk_full"), 100.0).detail
    assert expire(ended, 200.0) == ended


def test_a_clock_that_goes_back_does_not_make_a_pause_of_years() -> None:
    stumbled = after(Update("job", 1, state="fetching"), Stumbled("unreachable", "no route", now=2_100_000_000.0))
    assert due(stumbled, 2_100_000_001.0)[0] == "wait"
    assert due(stumbled, 1_800_000_000.0) == ("fetch", 0.0)
    assert due(stumbled, 0.0) == ("fetch", 0.0)


def test_a_trial_does_not_expire() -> None:
    update = at("trial", expires=100.0)
    assert expire(update, 200.0) == update


def test_nothing_is_fetched_before_its_time_but_a_cancel_is_heard() -> None:
    update = at("reserved", not_before=500.0)
    assert due(update, 499.0) == ("wait", 500.0)
    assert due(update, 500.0) == ("begin_fetch", 0.0)
    assert due(after(update, CANCEL), 0.0) == ("discard", 0.0)


def test_a_damaged_file_is_fetched_again_but_not_for_ever() -> None:
    update = at("fetched")
    for _ in range(MOST_DAMAGES - 1):
        update = after(update, Damaged("3 pieces were wrong"))
        assert (update.state, update.code) == ("fetching", "damaged")
        update = after(update, Done())
        assert update.state == "fetched"
    ended = after(update, Damaged("3 pieces were wrong"))
    assert (ended.ending, ended.code) == ("failed", "damaged")


def test_a_soak_that_fails_is_a_roll_back_and_not_a_failure() -> None:
    final = after(at("trial", soaking=True), RolledBack("soak_errors", "3 of 10"))
    assert (final.state, final.code, final.detail) == ("rolled_back", "soak_errors", "3 of 10")


def test_tidying_up_is_tried_once_and_going_back_until_it_works() -> None:
    discarding = after(at("staged"), CANCEL)
    assert after(discarding, Stumbled("conflict", "in use", 0.0)).state == "canceled"
    assert after(discarding, Refused("not_found", "gone")).state == "canceled"
    going_back = after(at("trial", soaking=True), CANCEL)
    again = after(going_back, Stumbled("storage_failed", "disk", 10.0))
    assert (again.state, again.ending, again.code, again.failures) == ("trial", "canceled", "canceled", 1)
    assert due(again, 0.0)[0] == "wait"
    assert due(again, again.retry_at)[0] == "roll_back"
    assert after(again, Refused("no_previous_version", "it was the first")).state == "canceled"


def test_the_first_reason_to_end_counts() -> None:
    ending = after(at("fetching"), Canceled("superseded", "by job 8"))
    assert after(ending, CANCEL).code == "superseded"


def test_a_recall_goes_back_and_fetches_nothing() -> None:
    update = replace(NEW, recall=True)
    assert due(update, 0.0)[0] == "verify"
    update = after(update, Done())
    assert due(update, 0.0)[0] == "roll_back"
    assert after(update, Refused("no_previous_version", "it was the first")).ending == "rejected"
    final = after(update, Done())
    assert (final.state, final.code) == ("rolled_back", "recalled")
    assert after(replace(NEW, recall=True), Refused("nothing_to_recall", "")).ending == "rejected"
    fetched = replace(NEW, recall=True, state="fetched")
    assert due(fetched, 0.0)[0] == "stage"  # a state that a recall never has, and that hurts nothing


def test_a_job_that_cancels_others_is_over_at_once() -> None:
    assert (canceling(NEW).state, canceling(NEW).code) == ("canceled", "canceled")


def test_only_a_higher_version_counts() -> None:
    assert supersedes(6, 7)
    assert not supersedes(7, 7)
    assert not supersedes(8, 7)


class Life(RuleBasedStateMachine):
    """Whatever happens, states follow their order, an end is undone first, and an end is final."""

    @initialize(expires=st.sampled_from([0.0, 5000.0]), recall=st.booleans())
    def begin(self, expires: float, recall: bool) -> None:
        self.update = replace(NEW, expires=expires, recall=recall)
        self.now = 0.0
        self.final: Update | None = None

    def happen(self, event: Event) -> None:
        before = self.update
        self.update = after(before, event)
        if before.ending is not None:
            assert self.update.ending in (before.ending, None)
            assert not self.update.over or self.update.state == before.ending
        if not self.update.over and self.update.state != before.state and not isinstance(event, Damaged):
            assert ORDER.index(self.update.state) == ORDER.index(before.state) + 1

    @rule(seconds=st.floats(0, 700))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.update = expire(self.update, self.now)

    @precondition(lambda self: not self.update.over)
    @rule(
        outcome=st.sampled_from(["done", "refused", "stumbled", "canceled"]),
    )
    def work(self, outcome: str) -> None:
        effect, until = due(self.update, self.now)
        if effect == "wait":
            assert until > self.now
            return
        events: dict[str, Event] = {
            "done": Done(),
            "refused": Refused("no", "never"),
            "stumbled": Stumbled("later", "not now", self.now),
            "canceled": CANCEL,
        }
        self.happen(RolledBack("soak_errors", "") if (effect, outcome) == ("settle", "refused") else events[outcome])

    @precondition(lambda self: self.update.state == "fetched" and not self.update.ending)
    @rule()
    def damage(self) -> None:
        self.happen(Damaged("bits"))

    @invariant()
    def ends_for_good(self) -> None:
        if hasattr(self, "update"):
            if self.final is not None:
                assert self.update == self.final
            elif self.update.over:
                self.final = self.update


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
