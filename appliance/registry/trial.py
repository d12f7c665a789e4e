"""When the trial of a version begins, when it is over, and which version a name then means. Policy only.

    activate ──▶ trial ──▶ confirmed     the soak went well, or nobody asked for one
                   │            │
                   └────────────┴──▶ rolled_back     its name means the version before again

A start of the server while a trial goes on is held against the version, until the server stops in order: whatever ends
the process, native code included, is seen at the next start and needs nobody who could still tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from appliance.core.errors import ConflictError
from appliance.core.wishes import WishState

MOST_BOOTS = 2
"""Starts of the server that a trial survives without being confirmed; the next one goes back."""
CRASHED = "crashed"


@dataclass(frozen=True, slots=True)
class Trial:
    """What is wished for a name, as far as the policy goes.

    Attributes:
        version: The version wished for.
        previous: The one before, or None if there was none.
        boots: Starts of the server since, without an orderly stop.
        reason: Why it was rolled back, for a person; "" otherwise.
        code: The same for programs.
    """

    version: str
    previous: str | None
    state: WishState
    boots: int = 0
    reason: str = ""
    code: str = ""

    @property
    def meant(self) -> str | None:
        """Return the version that the name means."""
        return self.previous if self.state == "rolled_back" else self.version


def activate(name: str, current: Trial | None, version: str, before: str | None, *, confirmed: bool) -> Trial:
    """Return what is wished once somebody wants a version.

    Args:
        name: The model's short name, for the error.
        current: What is wished now, if anything.
        version: What is wanted.
        before: The version to go back to where nothing was wished for yet.
        confirmed: Whether it needs no trial.

    Raises:
        ConflictError: Another version is on trial.
    """
    if current is None:
        return Trial(version, before, "confirmed" if confirmed else "trial")
    if current.state == "trial" and current.version != version:
        raise ConflictError(
            f"{name}:{current.version} is on trial; nothing was changed.",
            advice=f"Wait until it is over, or end it: appliance models rollback {name}",
            code="trial_in_progress",
        )
    if current.meant == version:
        if current.state == "rolled_back":  # the way back is no longer to the version that failed
            return Trial(version, None, "confirmed")
        return confirm(current) if confirmed else current
    return Trial(version, current.meant, "confirmed" if confirmed else "trial")


def confirm(trial: Trial) -> Trial:
    """Return what is wished once a trial went well; what is not on trial stays as it is."""
    return replace(trial, state="confirmed", boots=0) if trial.state == "trial" else trial


def roll_back(trial: Trial, code: str, reason: str) -> Trial:
    """Return what is wished once a version turned out bad; it is said once."""
    if trial.state == "rolled_back":
        return trial
    return replace(trial, state="rolled_back", code=code, reason=reason)


def boot(trial: Trial) -> Trial:
    """Return what is wished once the server starts again."""
    if trial.state != "trial":
        return trial
    boots = trial.boots + 1
    if boots <= MOST_BOOTS:
        return replace(trial, boots=boots)
    ended = f"The server ended {MOST_BOOTS} times while version {trial.version} was on trial, and did not say why."
    return roll_back(replace(trial, boots=boots), CRASHED, ended)


def stopped_in_order(trial: Trial) -> Trial:
    """Return what is wished once the server has stopped as it should: that start is held against nobody."""
    return replace(trial, boots=max(0, trial.boots - 1)) if trial.state == "trial" else trial


def meant_version(trial: Trial | None, registered: Sequence[str]) -> str | None:
    """Return the version that a name means, of those that are registered, oldest first; None if there is none.

    A wish for what was removed all the same counts as none; a version that was rolled back is never fallen back to.
    """
    if trial is None:
        return registered[-1] if registered else None
    if trial.meant in registered:
        return trial.meant
    refused = trial.version if trial.state == "rolled_back" else None
    others = [each for each in registered if each != refused]
    if trial.previous in others:
        return trial.previous
    return others[-1] if others else None
