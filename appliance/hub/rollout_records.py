"""Rollouts as plain data, and what any store of them has to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from appliance.core.fleet import JobReport
from appliance.hub.rollout_policy import Decision, MemberState, Plan, Progress, Tally


@dataclass(frozen=True, slots=True)
class Audience:
    """To whom a rollout goes: a group, or named devices; to all if neither is given."""

    group: str = ""
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Options:
    """What each job of a rollout says.

    Attributes:
        window: Such as `01:00-05:00`, by the device's local time; "" is at any time.
        expires_s: Seconds after which a device gives up on failures that may pass.
        mirrors: See `Job`.
        trial_s: See `Job`.
        trial_requests: See `Job`.
    """

    window: str = ""
    expires_s: float = 30 * 86_400.0
    mirrors: tuple[str, ...] = ()
    trial_s: float = 600.0
    trial_requests: int = 0


@dataclass(frozen=True, slots=True)
class Rollout:
    """A rollout.

    Attributes:
        id: Its name.
        model: Of the release.
        release: `model:version`.
        target: Path of the release document in the signed repository; `length` and `digest` are the document's.
        counter: Of the release.
        attempt: Counts the retries, from 1.
        created: Unix seconds.
        actor: Who began it.
    """

    id: str
    model: str
    release: str
    target: str
    length: int
    digest: str
    counter: int
    audience: Audience
    options: Options
    plan: Plan
    progress: Progress
    attempt: int
    created: float
    actor: str


@dataclass(frozen=True, slots=True)
class Member:
    """A device in a rollout; `heard` is when it last reported, Unix seconds."""

    device: str
    wave: int
    state: MemberState
    job: str
    reported: str
    percent: int
    code: str
    detail: str
    heard: float | None


@dataclass(frozen=True, slots=True)
class Step:
    """A step in a rollout's timeline, and why it happened."""

    at: float
    actor: str
    step: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceJob:
    """The one current job of a device: `document` is the job as JSON, to be signed when it is sent."""

    device: str
    version: int
    document: bytes


JobOf = Callable[[Rollout, str, int, str, str], bytes]
"""Makes the document of a job: of a rollout, for a device, in a version, with an id and an action."""


class RolloutStore(Protocol):
    """Where they are kept; SQLite here, PostgreSQL could do it. Each method is one transaction."""

    def find(self, rollout: str) -> Rollout:
        """Return a rollout.

        Raises:
            NotFoundError: There is none of that id.
        """
        ...

    def unfinished(self) -> Sequence[Rollout]:
        """Return the rollouts that are neither completed nor aborted, oldest first."""
        ...

    def open_to_newcomers(self) -> Sequence[Rollout]:
        """Return the newest completed rollout of each model, unless another is under way or the release withdrawn."""
        ...

    def tallies(self, rollout: Rollout) -> tuple[Tally, Tally]:
        """Return how the wave under way stands, and how all of them do."""
        ...

    def members(self, rollout: str) -> Sequence[Member]:
        """Return the devices of a rollout, by wave."""
        ...

    async def settle(
        self, before: Rollout, progress: Progress, decision: Decision, joining: Sequence[str], now: float
    ) -> bool:
        """Make a decision count, unless the rollout has changed since it was read; return whether it did.

        Args:
            before: The rollout as it was decided on.
            progress: After the decision.
            decision: For the timeline.
            joining: Devices that join in the wave of `progress`.
            now: Unix seconds.
        """
        ...

    async def give_jobs(self, rollout: Rollout, *, most: int) -> int:
        """Give queued devices their job, unless they are busy with another's; return to how many."""
        ...

    async def report(self, device: str, report: JobReport, now: float) -> None:
        """Keep what a device reports, once, and let it count."""
        ...

    def to_send(self, most: int) -> Sequence[DeviceJob]:
        """Return jobs that are to be sent."""
        ...

    async def sent(self, versions: Mapping[str, int], now: float, key: str) -> None:
        """Note what the broker has, signed with a key: versions by device.

        A job that has changed since is still to be sent, and so are all if another key signs by now.
        """
        ...
