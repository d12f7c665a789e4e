from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from appliance.core.errors import ConflictError
from appliance.registry.trial import (
    MOST_BOOTS,
    Trial,
    activate,
    boot,
    confirm,
    meant_version,
    roll_back,
    stopped_in_order,
)

ON_TRIAL = Trial("2", "1", "trial")


def test_the_first_wish_goes_back_to_what_the_name_meant() -> None:
    assert activate("m", None, "2", "1", confirmed=False) == ON_TRIAL
    assert activate("m", None, "2", "1", confirmed=True) == Trial("2", "1", "confirmed")


def test_another_version_waits_for_the_end_of_a_trial() -> None:
    with pytest.raises(ConflictError, match="m:2 is on trial") as refusal:
        activate("m", ON_TRIAL, "3", None, confirmed=True)
    assert refusal.value.code == "trial_in_progress"


def test_the_same_wish_again_changes_nothing_but_can_end_the_trial() -> None:
    assert activate("m", ON_TRIAL, "2", None, confirmed=False) is ON_TRIAL
    assert activate("m", ON_TRIAL, "2", None, confirmed=True) == Trial("2", "1", "confirmed")


def test_the_next_wish_goes_back_to_what_the_name_means_now() -> None:
    assert activate("m", Trial("2", "1", "confirmed"), "3", None, confirmed=False) == Trial("3", "2", "trial")
    assert activate("m", Trial("2", "1", "rolled_back"), "3", None, confirmed=True) == Trial("3", "1", "confirmed")
    assert activate("m", Trial("2", "1", "rolled_back"), "2", None, confirmed=False) == ON_TRIAL


def test_wishing_for_what_was_gone_back_to_leaves_no_way_back_to_what_failed() -> None:
    assert activate("m", Trial("2", "1", "rolled_back"), "1", None, confirmed=False) == Trial("1", None, "confirmed")


def test_only_a_trial_is_confirmed() -> None:
    assert confirm(Trial("2", "1", "trial", boots=2)) == Trial("2", "1", "confirmed")
    gone = Trial("2", "1", "rolled_back", code="crashed")
    assert confirm(gone) is gone


def test_the_first_reason_for_going_back_is_kept() -> None:
    gone = roll_back(ON_TRIAL, "soak_errors", "3 of 9")
    assert (gone.state, gone.code, gone.reason, gone.meant) == ("rolled_back", "soak_errors", "3 of 9", "1")
    assert roll_back(gone, "crashed", "later") is gone


def test_the_third_start_without_an_orderly_stop_goes_back() -> None:
    trial = boot(boot(ON_TRIAL))
    assert (trial.state, trial.boots) == ("trial", MOST_BOOTS)
    gone = boot(trial)
    assert (gone.state, gone.code, gone.meant) == ("rolled_back", "crashed", "1")
    assert boot(gone) is gone


def test_an_orderly_stop_is_held_against_nobody() -> None:
    assert stopped_in_order(boot(ON_TRIAL)) == ON_TRIAL
    assert stopped_in_order(ON_TRIAL) == ON_TRIAL
    confirmed = Trial("2", "1", "confirmed")
    assert stopped_in_order(confirmed) is confirmed


@pytest.mark.parametrize(
    ("trial", "registered", "meant"),
    [
        (None, ["1", "2"], "2"),
        (None, [], None),
        (ON_TRIAL, ["1", "2", "3"], "2"),
        (ON_TRIAL, ["1", "3"], "1"),
        (ON_TRIAL, ["3"], "3"),
        (ON_TRIAL, [], None),
        (Trial("2", "1", "rolled_back"), ["1", "2"], "1"),
        (Trial("2", "1", "rolled_back"), ["2", "3"], "3"),
        (Trial("2", "1", "rolled_back"), ["2"], None),
        (Trial("1", None, "rolled_back"), ["1"], None),
    ],
)
def test_what_a_name_means(trial: Trial | None, registered: list[str], meant: str | None) -> None:
    assert meant_version(trial, registered) == meant


@given(st.from_type(Trial), st.lists(st.text(max_size=2), unique=True))
def test_what_a_name_means_is_registered_and_never_what_was_rolled_back(trial: Trial, registered: list[str]) -> None:
    meant = meant_version(trial, registered)
    assert meant is None or meant in registered
    if trial.state == "rolled_back" and trial.previous != trial.version:
        assert meant != trial.version


VERSIONS = st.sampled_from(["1", "2", "3"])


class TrialMachine(RuleBasedStateMachine):
    """Whatever happens, a crashing version is left after two starts, and the way back leads to what worked."""

    @initialize()
    def box(self) -> None:
        self.trial: Trial | None = None
        self.worked = "0"
        self.crashes = 0

    @rule(version=VERSIONS, confirmed=st.booleans())
    def wish(self, version: str, confirmed: bool) -> None:
        before = self.trial
        try:
            self.trial = activate("m", before, version, self.worked, confirmed=confirmed)
        except ConflictError:
            assert before is not None
            assert before.state == "trial"
            return
        assert self.trial.meant == version
        if self.trial != before:
            self.crashes = 0
        if self.trial.state == "confirmed":
            self.worked = version

    @precondition(lambda self: self.trial)
    @rule()
    def soak_ends_well(self) -> None:
        assert self.trial is not None
        self.trial = confirm(self.trial)
        self.worked = self.trial.meant or self.worked

    @precondition(lambda self: self.trial)
    @rule(code=st.sampled_from(["soak_errors", "not_loadable"]))
    def goes_back(self, code: str) -> None:
        assert self.trial is not None
        self.trial = roll_back(self.trial, code, "")
        self.worked = self.trial.meant or self.worked

    @precondition(lambda self: self.trial)
    @rule()
    def crash_and_start(self) -> None:
        assert self.trial is not None
        on_trial = self.trial.state == "trial"
        self.crashes += on_trial
        self.trial = boot(self.trial)
        if on_trial:
            assert (self.trial.state == "rolled_back") == (self.crashes > MOST_BOOTS)
        if self.trial.state == "rolled_back":
            self.worked = self.trial.meant or self.worked

    @precondition(lambda self: self.trial)
    @rule()
    def stop_and_start(self) -> None:
        assert self.trial is not None
        before = self.trial
        self.trial = boot(stopped_in_order(before))
        if before.boots:
            assert self.trial == before
        self.crashes = self.trial.boots if self.trial.state == "trial" else self.crashes

    @invariant()
    def a_name_with_a_version_before_means_something(self) -> None:
        if self.trial is not None:
            assert self.trial.meant is not None or self.trial.previous is None
            assert self.trial.previous != self.trial.version


TestTrial = TrialMachine.TestCase
