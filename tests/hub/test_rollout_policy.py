"""When a rollout goes on, waits, stops: each rule by itself, a whole fleet, and what holds whatever devices say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from appliance.hub.rollout_policy import (
    ALLOWED,
    Candidate,
    MemberState,
    PersonStep,
    Plan,
    Progress,
    Tally,
    after_report,
    choose,
    completed,
    decide,
    resumed,
    retried,
    said,
    soaked,
    started,
    stopped,
    takes_newcomers,
)
from appliance.hub.rollout_window import Window, parse_window

PLAN = Plan(soak_s=100.0, patience_s=1000.0)
CANARY = Progress(wave=0, since=10.0)
SECOND = Progress(wave=1, since=10.0)


def action(progress: Progress, wave: Tally, every: Tally | None = None, now: float = 20.0) -> tuple[str, str]:
    decision = decide(PLAN, progress, wave, every or wave, now)
    assert decision.reason
    return decision.action, decision.code


def test_it_begins_with_the_canaries() -> None:
    assert action(Progress(), Tally()) == ("start", "")


@pytest.mark.parametrize("state", ["paused", "failed", "aborted"])
def test_what_is_not_running_waits_for_a_person(state: Any) -> None:
    assert action(replace(CANARY, state=state), Tally(failed=50)) == ("wait", "")


def test_a_wave_that_is_not_done_is_waited_for() -> None:
    assert action(CANARY, Tally(sent=1, succeeded=9)) == ("wait", "")
    assert action(CANARY, Tally(running=1, succeeded=9)) == ("wait", "")


def test_a_wave_that_succeeded_soaks_and_then_the_next_begins() -> None:
    done = Tally(succeeded=10)
    assert action(CANARY, done) == ("soak", "")
    soaking = soaked(CANARY, 20.0)
    assert action(soaking, done, now=119.0) == ("wait", "")
    assert action(soaking, done, now=120.0) == ("start", "")
    assert started(soaking, 120.0) == Progress(wave=1, since=120.0)


def test_after_the_last_wave_it_is_complete() -> None:
    last = soaked(replace(SECOND, wave=PLAN.last_wave), 20.0)
    assert action(last, Tally(succeeded=10), Tally(succeeded=100), now=120.0) == ("complete", "")


def test_newcomers_join_the_last_wave_and_come_after_the_end_until_too_many_of_them_fail() -> None:
    last = replace(SECOND, wave=PLAN.last_wave)
    assert not takes_newcomers(PLAN, SECOND)
    assert takes_newcomers(PLAN, last)
    assert not takes_newcomers(PLAN, stopped(last, "paused", "person"))
    before = Tally(succeeded=98, failed=2)
    done = completed(last, before)
    assert takes_newcomers(PLAN, done)
    assert action(done, before) == ("wait", ""), "what failed before was tolerated"
    assert action(done, replace(before, failed=4)) == ("wait", ""), "2 % of the wave"
    assert action(done, replace(before, failed=5)) == ("close", "too_many_failed")
    closed = stopped(done, "completed", "too_many_failed")
    assert not takes_newcomers(PLAN, closed)
    assert action(closed, replace(before, failed=50)) == ("wait", ""), "it is said once"


def test_one_failed_canary_pauses() -> None:
    assert action(CANARY, Tally(succeeded=99, failed=1)) == ("pause", "canary_failed")


def test_a_later_wave_tolerates_few_failures() -> None:
    assert action(SECOND, Tally(succeeded=98, failed=2)) == ("soak", "")
    assert action(SECOND, Tally(succeeded=97, failed=3)) == ("pause", "too_many_failed")


def test_it_fails_at_a_share_and_a_number_of_failures_only() -> None:
    assert action(SECOND, Tally(succeeded=1, failed=2)) == ("pause", "too_many_failed")
    assert action(SECOND, Tally(succeeded=27, failed=3)) == ("fail", "too_many_failed")
    assert action(SECOND, Tally(succeeded=28, failed=3))[0] == "pause"
    assert action(CANARY, Tally(sent=90, failed=3)) == ("fail", "too_many_failed")


def test_few_unreached_devices_are_gone_on_without_after_a_while() -> None:
    wave = Tally(sent=2, succeeded=8, heard=500.0)
    assert action(CANARY, wave, now=1499.0) == ("wait", "")
    assert action(CANARY, wave, now=1500.0) == ("soak", "")


def test_many_unreached_devices_are_doubt_and_not_failure() -> None:
    assert action(CANARY, Tally(sent=3, succeeded=7), now=1010.0) == ("pause", "unreached")
    assert action(CANARY, Tally(queued=10), now=1010.0) == ("pause", "unreached")


def test_a_silence_of_those_who_began_is_doubt() -> None:
    assert action(CANARY, Tally(running=1, succeeded=99), now=1010.0) == ("pause", "silent")


def test_a_wave_in_which_nobody_succeeded_proves_nothing() -> None:
    assert action(CANARY, Tally(canceled=2)) == ("pause", "unconfirmed")


def test_a_wave_of_nobody_passes() -> None:
    assert action(SECOND, Tally()) == ("soak", "")


def test_whoever_resumes_accepts_what_stopped_it_and_no_more() -> None:
    every = Tally(succeeded=99, failed=1)
    paused = stopped(CANARY, "paused", "canary_failed")
    on = resumed(paused, every, every, 500.0)
    assert action(on, every) == ("soak", "")
    assert action(on, Tally(succeeded=98, failed=2)) == ("pause", "canary_failed")
    half = Tally(sent=5, succeeded=5)
    silent = resumed(stopped(CANARY, "paused", "unreached"), half, half, 500.0)
    assert action(silent, Tally(sent=5, succeeded=5)) == ("soak", "")
    assert not started(silent, 600.0).accepts_silence
    by_hand = resumed(stopped(CANARY, "paused", "person"), Tally(running=5), Tally(running=5), 500.0)
    assert action(by_hand, Tally(running=5), now=600.0) == ("wait", "")
    hopeless = Tally(failed=2)
    accepted = resumed(stopped(CANARY, "paused", "canary_failed"), hopeless, hopeless, 500.0)
    assert action(accepted, hopeless) == ("soak", ""), "a person's word counts"


def test_whoever_retries_begins_counting_anew() -> None:
    again = retried(replace(stopped(SECOND, "failed", "too_many_failed"), accepted_failures=2), 500.0)
    assert again == Progress(wave=1, since=500.0)


@pytest.mark.parametrize(
    ("step", "state", "code"),
    [
        ("pause", "paused", "person"),
        ("resume", "running", ""),
        ("retry", "running", ""),
        ("abort", "aborted", "person"),
        ("recall", "aborted", "person"),
    ],
)
def test_what_a_person_says_is_done_and_can_be_said_where_it_makes_sense(
    step: PersonStep, state: str, code: str
) -> None:
    every = Tally(succeeded=8, failed=2)
    before = stopped(SECOND, "failed", "too_many_failed")
    after = said(step, before, every, every, 500.0)
    assert (after.state, after.code) == (state, code)
    assert after.accepted_failures == (2 if step == "resume" else 0)
    assert (before.state in ALLOWED[step]) == (step != "pause")
    assert ("completed" in ALLOWED[step]) == (step in ("abort", "recall")), "what is over is over, but for an end to it"


def fleet(count: int, classes: int = 3) -> list[Candidate]:
    return [Candidate(f"box-{n}", f"class-{n % classes}") for n in range(count)]


def test_canaries_are_one_percent_two_at_least_and_cover_every_hardware_class() -> None:
    assert len(choose(PLAN, 0, 0, fleet(10_000), "r")) == 100
    assert len(choose(PLAN, 0, 0, fleet(10, 1), "r")) == 2
    assert choose(PLAN, 0, 0, fleet(1, 1), "r") == ["box-0"]
    assert choose(PLAN, 0, 0, [], "r") == []
    rare = [*fleet(1000, 1), *(Candidate(f"rare-{n}", f"rare-{n}", online=False) for n in range(20))]
    chosen = choose(PLAN, 0, 0, rare, "r")
    assert len(chosen) == 21
    assert sum(each.startswith("rare") for each in chosen) == 20


def test_canaries_are_online_if_they_can_be_and_not_always_the_same() -> None:
    half = [replace(each, online=n % 2 == 0) for n, each in enumerate(fleet(1000, 1))]
    chosen = choose(PLAN, 0, 0, half, "r")
    assert all(int(each[4:]) % 2 == 0 for each in chosen)
    assert set(chosen) != set(choose(PLAN, 0, 0, half, "s"))


def test_waves_grow_to_everyone_and_newcomers_are_in_the_last() -> None:
    candidates, members, sizes = fleet(1000), set[str](), list[int]()
    for wave in range(PLAN.last_wave + 1):
        if wave == PLAN.last_wave:
            candidates = [*candidates, Candidate("newcomer")]
        left = [each for each in candidates if each.device not in members]
        chosen = choose(PLAN, wave, len(members), left, "r")
        assert not members & set(chosen)
        members |= set(chosen)
        sizes.append(len(members))
    assert sizes == [10, 100, 500, 1001]
    assert choose(PLAN, 1, 600, fleet(10), "r") == [], "there are more than that already"


def test_one_percent_failing_canaries_of_ten_thousand_pause_it_and_touch_no_one_else() -> None:
    devices = [replace(each, device=f"d-{n}") for n, each in enumerate(fleet(10_000))]
    canaries = choose(Plan(), 0, 0, devices, "r")
    assert len(canaries) == 100
    progress, states = started(Progress(), 0.0), dict.fromkeys(canaries, "sent")
    for n, device in enumerate(canaries):
        states[device] = after_report("running", "failed" if n == 41 else "confirmed")
        tally = tally_of(list(states.values()), float(n))
        decision = decide(Plan(), progress, tally, tally, float(n))
        if decision.action == "pause":
            break
        assert decision.action == "wait"
    assert (decision.action, decision.code) == ("pause", "canary_failed")
    progress = stopped(progress, "paused", decision.code)
    for n, device in enumerate(canaries):
        states[device] = "failed" if n == 41 else "succeeded"
    for day in range(1, 100):
        tally = tally_of(list(states.values()), 0.0)
        assert decide(Plan(), progress, tally, tally, day * 86_400.0).action == "wait"
    assert len(states) == 100


def tally_of(states: list[str], heard: float) -> Tally:
    counts = {each: states.count(each) for each in ("queued", "sent", "running", "succeeded", "failed", "canceled")}
    return Tally(**counts, heard=heard)


@pytest.mark.parametrize(
    ("before", "reported", "after"),
    [
        ("sent", "seen", "running"),
        ("queued", "fetching", "running"),
        ("running", "confirmed", "succeeded"),
        ("running", "rolled_back", "failed"),
        ("running", "rejected", "failed"),
        ("running", "failed", "failed"),
        ("running", "canceled", "canceled"),
        ("canceled", "fetching", "canceled"),
        ("canceled", "failed", "canceled"),
        ("canceled", "confirmed", "succeeded"),
        ("succeeded", "failed", "succeeded"),
        ("failed", "confirmed", "failed"),
        ("recalled", "confirmed", "recalled"),
        ("recalling", "confirmed", "recalling"),
    ],
)
def test_a_report_moves_a_member(before: MemberState, reported: str, after: MemberState) -> None:
    assert after_report(before, reported) == after


class Rollout(RuleBasedStateMachine):
    """A rollout over a small fleet whose devices say what they like, with a person who interferes."""

    @initialize(count=st.integers(0, 60), classes=st.integers(1, 4))
    def begin(self, count: int, classes: int) -> None:
        self.now = 0.0
        self.progress = Progress()
        self.candidates = fleet(count, classes)
        self.waves: list[list[str]] = []
        self.states: dict[str, MemberState] = {}
        self.heard: dict[str, float] = {}
        self.resumed = False

    def tally(self, devices: list[str]) -> Tally:
        heard = max((self.heard.get(each, 0.0) for each in devices), default=0.0)
        return tally_of([self.states[each] for each in devices], heard)

    @rule(wait=st.floats(0, 5000))
    def step(self, wait: float) -> None:
        self.now += wait
        wave = self.waves[-1] if self.waves else []
        tally, every = self.tally(wave), self.tally(list(self.states))
        decision = decide(PLAN, self.progress, tally, every, self.now)
        if decision.action == "start":
            if self.waves and not self.resumed:
                assert not wave or tally.succeeded > 0, "only explicit success goes on"
                assert tally.running == 0
                assert tally.unreached <= 0.2 * len(wave)
                assert len(self.waves) > 1 or tally.failed == 0, "a failed canary touches no one else"
            left = [each for each in self.candidates if each.device not in self.states]
            chosen = choose(PLAN, self.progress.wave + 1, len(self.states), left, "r")
            self.waves.append(chosen)
            self.states.update(dict.fromkeys(chosen, "sent"))
            self.progress = started(self.progress, self.now)
        elif decision.action == "soak":
            self.progress = soaked(self.progress, self.now)
        elif decision.action == "complete":
            assert len(self.states) == len(self.candidates)
            self.progress = completed(self.progress, every)
        elif decision.action == "close":
            assert self.progress.state == "completed"
            assert every.failed > self.progress.accepted_failures, "only those who came later count"
            self.progress = stopped(self.progress, "completed", decision.code)
        elif decision.action in ("pause", "fail"):
            self.progress = stopped(self.progress, "paused" if decision.action == "pause" else "failed", decision.code)

    @rule()
    def come(self) -> None:
        """Let a device be there that was not there before."""
        if takes_newcomers(PLAN, self.progress):
            device = Candidate(f"new-{len(self.candidates)}")
            self.candidates.append(device)
            self.waves[-1].append(device.device)
            self.states[device.device] = "sent"

    @rule(data=st.data(), reported=st.sampled_from(["seen", "fetching", "confirmed", "failed", "rolled_back"]))
    def report(self, data: st.DataObject, reported: str) -> None:
        if self.states:
            device = data.draw(st.sampled_from(sorted(self.states)))
            self.states[device] = after_report(self.states[device], reported)
            self.heard[device] = self.now

    @rule()
    def all_succeed(self) -> None:
        for device in self.waves[-1] if self.waves else []:
            self.states[device] = after_report(self.states[device], "confirmed")
            self.heard[device] = self.now

    @rule()
    def resume(self) -> None:
        if self.progress.state in ("paused", "failed"):
            self.resumed = True
            wave, every = self.tally(self.waves[-1]), self.tally(list(self.states))
            self.progress = resumed(self.progress, wave, every, self.now)
            decision = decide(PLAN, self.progress, wave, every, self.now)
            assert decision.action not in ("pause", "fail"), "a person's word counts"

    @invariant()
    def nobody_is_in_two_waves(self) -> None:
        if hasattr(self, "waves"):
            assert sum(map(len, self.waves)) == len(self.states)


TestRollout = Rollout.TestCase
TestRollout.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def test_a_window_is_read_or_refused() -> None:
    assert parse_window("01:00-05:30") == Window(3600, 19_800)
    assert [parse_window(each) for each in ("", "1:00-2:00", "25:00-26:00", "01:00-01:00", "01:00 05:00")] == [None] * 5


def test_a_window_opens_by_the_devices_own_clock() -> None:
    night = Window(3600, 5 * 3600)
    noon = 12 * 3600.0
    assert night.not_before(noon, 0.0) == 25 * 3600.0
    assert night.not_before(2 * 3600.0, 0.0) == 0.0
    assert night.not_before(noon, -10 * 3600.0) == 0.0, "it is two o'clock there"
    assert night.not_before(5 * 3600.0, 0.0) == 25 * 3600.0, "the end is outside"
    assert night.not_before(2 * 3600.0, 1e9) == 0.0, "there is no such place"


@given(st.integers(0, 86_399), st.integers(1, 86_399), st.floats(0, 4e9), st.integers(-14 * 3600, 14 * 3600))
def test_what_a_window_answers_lies_within_it(begins: int, length: int, now: float, offset: int) -> None:
    window = Window(begins, (begins + length) % 86_400)
    when = window.not_before(now, offset) or now
    assert now <= when <= now + 86_400
    assert (when + offset - begins + 0.001) % 86_400 <= length + 0.01
