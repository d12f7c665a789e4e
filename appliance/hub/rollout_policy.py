"""When a rollout goes on, waits, stops: pure rules over what the devices have said so far.

    canary ─▶ 10 % ─▶ 50 % ─▶ all; each wave: sent ─▶ every one reached has succeeded ─▶ soak ─▶ the next

Devices that come later join the last wave, and get the release after the end too, unless too many of them fail.

Only explicit success counts. A device that was never reached has not failed, but too many of them, or a silence, are
doubt; doubt pauses, and failures beyond a share and a number end it. Both wait for a person.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Literal

from appliance.core.fleet import FINAL_STATES

RolloutState = Literal["running", "paused", "failed", "completed", "aborted"]
MemberState = Literal["queued", "sent", "running", "succeeded", "failed", "canceled", "recalling", "recalled"]
Action = Literal["wait", "start", "soak", "pause", "fail", "complete", "close"]
Code = Literal["", "person", "canary_failed", "too_many_failed", "silent", "unreached", "unconfirmed"]

FINISHED: frozenset[str] = frozenset({"completed", "aborted"})
IN_FLIGHT: tuple[MemberState, ...] = ("queued", "sent", "running")


@dataclass(frozen=True, slots=True)
class Plan:
    """How a rollout proceeds.

    Attributes:
        canary_share: Of the devices, in the first wave.
        canary_least: Devices of the first wave, if there are so many.
        shares: Of the devices, reached by the end of each further wave; the last is 1.
        soak_s: Between the success of a wave and the next.
        patience_s: A wave in which nothing was heard for so long is not waited for any more.
        unreached_share: Of a wave's devices; with more of them unreached, it pauses.
        tolerated_share: Of a later wave's devices; with more of them failed, it pauses. A canary tolerates none.
        abort_share: Of the devices that are done; with so many failed, and `abort_least`, the rollout fails.
        abort_least: See there.
    """

    canary_share: float = 0.01
    canary_least: int = 2
    shares: tuple[float, ...] = (0.1, 0.5, 1.0)
    soak_s: float = 3600.0
    patience_s: float = 86_400.0
    unreached_share: float = 0.2
    tolerated_share: float = 0.02
    abort_share: float = 0.1
    abort_least: int = 3

    @property
    def last_wave(self) -> int:
        """Return the number of the last wave, the first being 0."""
        return len(self.shares)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rollout is.

    Attributes:
        state: Of the rollout.
        wave: The one under way, -1 before the first.
        since: Unix seconds: when the wave began, or was gone on with.
        soaking: Unix seconds since which all of the wave is well, or None.
        accepted_failures: Failures that a person has accepted.
        accepts_silence: Whether a person has accepted that the rest of this wave says nothing.
        code: Why it is paused or has failed; of a completed one, why devices that come later are left alone.
    """

    state: RolloutState = "running"
    wave: int = -1
    since: float = 0.0
    soaking: float | None = None
    accepted_failures: int = 0
    accepts_silence: bool = False
    code: Code = ""


@dataclass(frozen=True, slots=True)
class Tally:
    """How many devices are in which state, and when any of them was heard last (0 for never)."""

    queued: int = 0
    sent: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    canceled: int = 0
    heard: float = 0.0

    @property
    def unreached(self) -> int:
        """Return those that have never said anything."""
        return self.queued + self.sent

    @property
    def done(self) -> int:
        """Return those that have succeeded or failed."""
        return self.succeeded + self.failed

    @property
    def total(self) -> int:
        """Return all."""
        return self.unreached + self.running + self.done + self.canceled


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and why, for the timeline."""

    action: Action
    reason: str
    code: Code = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that a release may be brought to; `online` ones make the better canaries."""

    device: str
    hardware: str = ""
    online: bool = True


def decide(plan: Plan, progress: Progress, wave: Tally, every: Tally, now: float) -> Decision:
    """Decide what a rollout does next.

    Args:
        plan: How it proceeds.
        progress: How far it is.
        wave: Of the wave under way.
        every: Of all waves.
        now: Unix seconds.
    """
    if progress.state == "completed" and not progress.code:
        stop = _failures(plan, progress, wave, every)
        if stop is not None:
            return Decision("close", f"Devices that come later do not get the release: {stop.reason}", stop.code)
    if progress.state != "running":
        return Decision("wait", f"The rollout is {progress.state}.")
    if progress.wave < 0:
        return Decision("start", "The rollout begins with its canaries.")
    if (stop := _failures(plan, progress, wave, every)) is not None:
        return stop
    return _unfinished(plan, progress, wave, now) or _done(plan, progress, wave, every, now)


def _done(plan: Plan, progress: Progress, wave: Tally, every: Tally, now: float) -> Decision:
    """Return what follows on a wave that is as good as done."""
    if progress.soaking is None:
        return Decision("soak", f"{wave.succeeded} of {wave.total} have succeeded; it soaks for {plan.soak_s:g} s.")
    if now - progress.soaking < plan.soak_s:
        return Decision("wait", "The wave soaks.")
    if progress.wave >= plan.last_wave:
        return Decision("complete", f"{every.succeeded} of {every.total} devices have the release.")
    return Decision("start", f"The wave was well for {plan.soak_s:g} s: {wave.succeeded} of {wave.total} succeeded.")


def _failures(plan: Plan, progress: Progress, wave: Tally, every: Tally) -> Decision | None:
    new = every.failed - progress.accepted_failures
    done = every.done - progress.accepted_failures
    if new >= plan.abort_least and new >= plan.abort_share * done:
        reason = f"{new} of {done} devices failed: at least {plan.abort_least}, and {plan.abort_share:.0%} or more."
        return Decision("fail", reason, "too_many_failed")
    if new > 0 and progress.wave == 0:
        return Decision("pause", f"{new} of {wave.total} canaries failed.", "canary_failed")
    if new > plan.tolerated_share * wave.total:
        reason = f"{new} devices failed; {plan.tolerated_share:.0%} of a wave of {wave.total} would be tolerated."
        return Decision("pause", reason, "too_many_failed")
    return None


def _unfinished(plan: Plan, progress: Progress, wave: Tally, now: float) -> Decision | None:
    """Return what to do about those of a wave who are not done, or None if it is as good as done."""
    waiting = wave.running + wave.unreached
    if waiting and not progress.accepts_silence:
        if now - max(progress.since, wave.heard) < plan.patience_s:
            return Decision("wait", f"{waiting} of {wave.total} are not done.")
        if wave.running:
            reason = f"{wave.running} devices began and have said nothing for {plan.patience_s:g} s."
            return Decision("pause", reason, "silent")
        if wave.unreached > plan.unreached_share * wave.total:
            return Decision("pause", f"{wave.unreached} of {wave.total} devices were not reached.", "unreached")
    if wave.total and not wave.succeeded and not progress.accepts_silence:
        return Decision("pause", f"None of {wave.total} devices has succeeded.", "unconfirmed")
    return None


def started(progress: Progress, now: float) -> Progress:
    """Return the progress after the next wave has begun."""
    return replace(progress, wave=progress.wave + 1, since=now, soaking=None, accepts_silence=False)


def soaked(progress: Progress, now: float) -> Progress:
    """Return the progress after a wave began to soak."""
    return replace(progress, soaking=now)


def completed(progress: Progress, every: Tally) -> Progress:
    """Return the progress after all is done; only failures of devices that come later count from now on."""
    return replace(progress, state="completed", accepted_failures=every.failed)


def takes_newcomers(plan: Plan, progress: Progress) -> bool:
    """Return whether devices that were not there before join: those of the last wave, and all later ones do."""
    if progress.state == "completed":
        return not progress.code
    return progress.state == "running" and progress.wave >= plan.last_wave


def stopped(progress: Progress, state: RolloutState, code: Code) -> Progress:
    """Return the progress after it was paused, has failed, was aborted, or was closed for devices that come later."""
    return replace(progress, state=state, code=code)


def resumed(progress: Progress, wave: Tally, every: Tally, now: float) -> Progress:
    """Return the progress after a person said to go on: what is known until now does not stop it again."""
    return replace(
        progress,
        state="running",
        since=now,
        soaking=None,
        accepted_failures=every.failed,
        accepts_silence=progress.code in ("silent", "unreached") or not wave.running + wave.unreached,
        code="",
    )


def retried(progress: Progress, now: float) -> Progress:
    """Return the progress after a person had those tried again that failed or were canceled: they are queued anew."""
    return replace(
        progress, state="running", since=now, soaking=None, accepted_failures=0, accepts_silence=False, code=""
    )


PersonStep = Literal["pause", "resume", "retry", "abort", "recall"]
"""What a person may say to a rollout."""

ALLOWED: Mapping[PersonStep, tuple[RolloutState, ...]] = {
    "pause": ("running",),
    "resume": ("paused", "failed"),
    "retry": ("paused", "failed"),
    "abort": ("running", "paused", "failed", "completed"),
    "recall": ("running", "paused", "failed", "completed", "aborted"),
}
"""In which states of the rollout that makes sense."""


def said(step: PersonStep, progress: Progress, wave: Tally, every: Tally, now: float) -> Progress:
    """Return the progress after a person said so, in a state that allows it."""
    if step == "resume":
        return resumed(progress, wave, every, now)
    if step == "retry":
        return retried(progress, now)
    return stopped(progress, "paused" if step == "pause" else "aborted", "person")


def choose(plan: Plan, wave: int, members: int, candidates: Sequence[Candidate], seed: str) -> list[str]:
    """Return the devices of a wave that begins.

    Args:
        plan: Sets the sizes.
        wave: Which one, from 0.
        members: Devices of the waves before.
        candidates: Devices that are in none yet.
        seed: Of the rollout, so that it is not always the same boxes that go first.
    """
    if wave >= plan.last_wave:
        return [each.device for each in candidates]
    ordered = sorted(candidates, key=lambda each: (not each.online, _lot(seed, each.device)))
    population = members + len(ordered)
    if wave == 0:
        firsts = _one_of_each(ordered)
        size = max(plan.canary_least, math.ceil(plan.canary_share * population), len(firsts))
        chosen = dict.fromkeys([*firsts, *(each.device for each in ordered)])
        return list(chosen)[:size]
    size = math.ceil(plan.shares[wave - 1] * population) - members
    return [each.device for each in ordered[: max(0, size)]]


def _one_of_each(ordered: Iterable[Candidate]) -> list[str]:
    firsts: dict[str, str] = {}
    for each in ordered:
        firsts.setdefault(each.hardware, each.device)
    return list(firsts.values())


def _lot(seed: str, device: str) -> bytes:
    return sha256(f"{seed}\n{device}".encode()).digest()


def after_report(state: MemberState, reported: str) -> MemberState:
    """Return a member's state after its device reported where the installation stands.

    Success that crossed a cancellation is success; otherwise the first end stands.
    """
    if state in ("recalling", "recalled", "succeeded", "failed"):
        return state
    if reported == "confirmed":
        return "succeeded"
    if state == "canceled":
        return state
    if reported == "canceled":
        return "canceled"
    return "failed" if reported in FINAL_STATES else "running"
