"""How a job goes on a simulated device: its steps, and when each comes."""

from __future__ import annotations

from dataclasses import dataclass

from appliance.core.fleet import Job, JobState
from appliance.hub.simulation.traits import Traits

SLOWNESS = 10.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a job.

    Attributes:
        after: When it comes, as a share of the job's time.
        state: What is reported; None is the moment when the device is lost.
        percent: Of the fetch.
        code: Why it failed.
    """

    after: float
    state: JobState | None
    percent: int = 0
    code: str = ""


_FETCH = (
    Step(0.0, "seen"),
    Step(0.02, "verified"),
    Step(0.03, "reserved"),
    Step(0.05, "fetching"),
    Step(0.3, "fetching", 50),
)
_TEST = (Step(0.6, "fetched", 100), Step(0.65, "staged", 100), Step(0.7, "testing", 100))
_GOOD = (Step(0.8, "trial", 100), Step(1.0, "confirmed", 100))
_BAD = (Step(0.8, "failed", 100, "wrong_answer"),)
_LOST = (Step(0.35, None),)
_RECALL = (Step(0.0, "seen"), Step(0.3, "rolled_back", 100, "recalled"))
_CANCEL = (Step(0.0, "canceled", 0, "canceled"),)


def steps_of(job: Job, traits: Traits) -> tuple[Step, ...]:
    """Return the steps of a job on such a device."""
    if job.action == "cancel":
        return _CANCEL
    if job.action == "recall":
        return _RECALL
    if traits.lost:
        return _FETCH + _LOST
    return _FETCH + _TEST + (_BAD if traits.failing else _GOOD)


def seconds_of(job_s: float, traits: Traits) -> float:
    """Return how long a job takes on such a device."""
    return job_s * (SLOWNESS if traits.slow else 1.0)
