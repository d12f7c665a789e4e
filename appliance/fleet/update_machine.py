"""The life of an update: which state follows which, upon what, and the one side effect that is due in each. Pure.

    seen ─verify─> verified ─reserve─> reserved ─wait─> fetching ─fetch─> fetched ─stage─> staged ─begin_test─> testing
    testing ─test─> trial ─activate─> trial, soaking ─settle─> confirmed | rolled_back
    fetched ─stage, damaged─> fetching

Every state is in the journal before its side effect begins, and every side effect can be repeated: after a crash the
one that is due is simply done again. A job that must end early gets its `ending` first; what it had begun is undone
(`roll_back` of a trial, else `discard`), and only then does it have that state. Trouble that may pass is tried again
with growing pauses until the job expires; a trial does not expire, for it decides itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from appliance.core.fleet import FINAL_STATES, JobState

Effect = Literal[
    "none",
    "wait",
    "verify",
    "reserve",
    "begin_fetch",
    "fetch",
    "stage",
    "begin_test",
    "test",
    "activate",
    "settle",
    "roll_back",
    "discard",
]

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 600.0
RECALLED = "recalled"
DAMAGED = "damaged"
_NONE = ""
MOST_DAMAGES = 3
"""How often a file whose pieces were right may be wrong as a whole, before disk or release count as bad."""


@dataclass(frozen=True, slots=True)
class Update:
    """One job, as the journal has it.

    Attributes:
        job: Its id.
        version: Of the job.
        state: Where it stands.
        attempt: Counts from 1.
        not_before: Unix seconds before which nothing is fetched.
        expires: Unix seconds after which passing trouble is tried no more; 0 is never.
        recall: It is no installation, but undoes one.
        soaking: The wish has been moved.
        ending: How it will end once what it began is undone, or None.
        failures: Of the side effect that is due, in a row.
        damages: How often the whole file was wrong.
        retry_at: Unix seconds before which the side effect is not tried again.
        code: Stable slug of what went wrong last, or "".
        detail: The same for a person.
    """

    job: str
    version: int
    state: JobState = "seen"
    attempt: int = 1
    not_before: float = 0.0
    expires: float = 0.0
    recall: bool = False
    soaking: bool = False
    ending: JobState | None = None
    failures: int = 0
    damages: int = 0
    retry_at: float = 0.0
    code: str = ""
    detail: str = ""

    @property
    def over(self) -> bool:
        """Tell whether it has ended."""
        return self.state in FINAL_STATES


@dataclass(frozen=True, slots=True)
class Done:
    """The side effect has been carried out."""


@dataclass(frozen=True, slots=True)
class Refused:
    """It can never work: gone, forged, not for this hardware, a failed test."""

    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Stumbled:
    """It did not work now. `spread`, 0.5 to 1, keeps a fleet from trying again all at once."""

    code: str
    detail: str
    now: float
    spread: float = 1.0


@dataclass(frozen=True, slots=True)
class Damaged:
    """The staged file is not what was fetched; the bad pieces have been dropped."""

    detail: str


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The box went back to the version before: the soak failed, or it did not survive the start."""

    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Canceled:
    """Somebody wants it no more: a cancel, a recall, or a newer job."""

    code: str
    detail: str


Event = Done | Refused | Stumbled | Damaged | RolledBack | Canceled

_DUE: dict[JobState, tuple[Effect, JobState]] = {
    "seen": ("verify", "verified"),
    "verified": ("reserve", "reserved"),
    "reserved": ("begin_fetch", "fetching"),
    "fetching": ("fetch", "fetched"),
    "fetched": ("stage", "staged"),
    "staged": ("begin_test", "testing"),
    "testing": ("test", "trial"),
}
"""The side effect of each state before the trial, and the state that follows when it has been carried out."""


def due(update: Update, now: float) -> tuple[Effect, float]:
    """Return the one side effect that is due, and for `wait` until when to wait, in Unix seconds."""
    if update.over:
        return "none", 0.0
    if now < update.retry_at <= now + LONGEST_PAUSE_S:  # no pause is longer, so a clock has gone back meanwhile
        return "wait", update.retry_at
    if update.state == "reserved" and not update.ending and now < update.not_before:
        return "wait", update.not_before
    return _effect(update), 0.0


def _effect(update: Update) -> Effect:
    if update.ending is not None:
        return "roll_back" if update.state == "trial" else "discard"
    if update.state == "trial":
        return "settle" if update.soaking else "activate"
    if update.recall and update.state == "verified":
        return "roll_back"
    return _DUE[update.state][0]


def after(update: Update, event: Event) -> Update:
    """Return the update as it is once the event has happened; one that is over stays as it is."""
    if update.over:
        return update
    if isinstance(event, Done):
        return _carried_out(update)
    if isinstance(event, Stumbled):
        return _stumbled(update, event)
    if isinstance(event, Refused):
        return _refused(update, event)
    if isinstance(event, Damaged):
        return _damaged(update, event)
    return _ended(update, event)


def _ended(update: Update, event: Canceled | RolledBack) -> Update:
    if isinstance(event, Canceled):
        return _end(update, "canceled", event.code, event.detail)
    return replace(_calm(update), state="rolled_back", code=event.code, detail=event.detail)


def expire(update: Update, now: float) -> Update:
    """Return the update, ended if its time is over before its trial."""
    if update.over or update.ending or update.state == "trial" or not 0 < update.expires <= now:
        return update
    why = f" The last trouble was: {update.code}: {update.detail}" if update.code else ""
    return _end(update, "failed", "expired", f"The job's time was over in the state {update.state}.{why}")


def _carried_out(update: Update) -> Update:
    if update.ending is not None:
        return replace(_calm(update), state=update.ending, ending=None)
    if update.recall and update.state == "verified":
        return replace(_calm(update), state="rolled_back", code=RECALLED)
    if update.state == "trial":
        calm = replace(_calm(update), code=_NONE, detail="")
        return replace(calm, state="confirmed") if update.soaking else replace(calm, soaking=True)
    return replace(_calm(update), state=_DUE[update.state][1], code=_NONE, detail="")


def _stumbled(update: Update, event: Stumbled) -> Update:
    if update.ending is not None and update.state != "trial":
        return _carried_out(update)  # what could not be tidied up now, the next start of the registry does
    pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(update.failures, 20)) * event.spread
    failures, retry_at = update.failures + 1, event.now + pause
    if update.ending is not None:
        return replace(update, failures=failures, retry_at=retry_at)
    return replace(update, failures=failures, retry_at=retry_at, code=event.code, detail=event.detail)


def _refused(update: Update, event: Refused) -> Update:
    if update.ending is not None:
        return _carried_out(update)  # there is nothing to undo
    ending: JobState = "rejected" if update.state == "seen" or update.recall else "failed"
    return _end(update, ending, event.code, event.detail)


def _damaged(update: Update, event: Damaged) -> Update:
    if update.damages + 1 >= MOST_DAMAGES:
        return _end(update, "failed", DAMAGED, event.detail)
    damages = update.damages + 1
    return replace(_calm(update), state="fetching", damages=damages, code=DAMAGED, detail=event.detail)


def _end(update: Update, ending: JobState, code: str, detail: str) -> Update:
    if update.ending is not None:
        return update  # the first reason counts
    return replace(_calm(update), ending=ending, code=code, detail=detail)


def _calm(update: Update) -> Update:
    return replace(update, failures=0, retry_at=0.0)


def canceling(update: Update) -> Update:
    """Return the job that asks for the end of others: it is over as soon as that is written down."""
    return after(after(update, Canceled("canceled", "It asked for the end of another job.")), Done())


def supersedes(newest: int, version: int) -> bool:
    """Tell whether a job of this version counts, the newest seen being `newest`."""
    return version > newest
