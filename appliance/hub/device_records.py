"""Devices as the hub knows them, and the store that keeps them: plain data in and out, so that any database can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from appliance.core.fleet import DeviceState, Reported
from appliance.hub.presence import Verdict

DeviceStatus = Literal["unreached", "online", "lost", "stopping"]


@dataclass(frozen=True, slots=True)
class Device:
    """A device.

    Attributes:
        id: Its name everywhere.
        created: When it was first known; times are Unix seconds by the hub's clock unless they say otherwise.
        status: `unreached` until its first word.
        instance: Of its installation, "" before its first word.
        epoch: Of its newest session.
        began: When that session began, by the device's clock.
        seen: When it last said anything, or None.
        agent: Version of its program.
        quarantined: Since when two boxes use its identity, or None.
        hardware: Its hardware class, "" until it is reported.
        reported_version: Of the reported twin, 0 for none.
        desired_version: Of the desired twin that it said it has applied.
        reported_at: When the reported twin came, or None.
        groups: Names.
        labels: Values by name.
    """

    id: str
    created: float
    status: DeviceStatus
    instance: str
    epoch: int
    began: float
    seen: float | None
    agent: str
    quarantined: float | None
    hardware: str
    reported_version: int
    desired_version: int
    reported_at: float | None
    groups: tuple[str, ...]
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """What an operator should know of a device: `moved`, `clone`, `released`, ….

    Attributes:
        id: Rises.
        at: Unix seconds.
        kind: Stable slug.
        detail: For a person.
    """

    id: int
    device: str
    at: float
    kind: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Which:
    """Devices to look for: each condition that is given must hold.

    Attributes:
        status: Its status, or `quarantined`.
        group: A group it is in.
        hardware: Its hardware class.
        seen_before: It said nothing since, or never.
    """

    status: str | None = None
    group: str | None = None
    hardware: str | None = None
    seen_before: float | None = None


@dataclass(frozen=True, slots=True)
class Kinds:
    """How many devices there are of each kind.

    Attributes:
        quiet: Those that said nothing since a time, or never.
        agents: By version of the program.
        hardware: By hardware class.
    """

    quiet: int
    agents: Mapping[str, int]
    hardware: Mapping[str, int]


class DeviceStore(Protocol):
    """What is kept of devices. What changes is on the disk when a method returns."""

    def find(self, device: str) -> Device | None:
        """Return a device, or None."""
        ...

    def get(self, device: str) -> Device:
        """Return a device.

        Raises:
            NotFoundError: There is none of that id.
        """
        ...

    def list(self, which: Which, *, limit: int, after: str = "") -> Sequence[Device]:
        """Return devices in the order of their ids, at most `limit`, with ids behind `after`."""
        ...

    def counts(self) -> Mapping[str, int]:
        """Return how many devices there are by status, those in quarantine only as `quarantined`."""
        ...

    def kinds(self, quiet_since: float) -> Kinds:
        """Return how many devices there are of each kind."""
        ...

    def reported(self, device: str) -> Reported | None:
        """Return the reported twin, or None before the first.

        Raises:
            NotFoundError: There is no such device.
        """
        ...

    def events(self, device: str, *, limit: int = 100) -> Sequence[DeviceEvent]:
        """Return what happened to a device, newest first."""
        ...

    async def expect(self, device: str) -> None:
        """Note a device that was given a certificate; one that is known stays as it is."""
        ...

    async def note_state(self, device: str, state: DeviceState, *, retained: bool) -> Verdict:
        """Take in a state message and return what it was worth."""
        ...

    async def note_report(self, device: str, reported: Reported, document: bytes, *, retained: bool) -> bool:
        """Take in a reported twin; return False if a newer one is known."""
        ...

    async def note_seen(self, seen: Mapping[str, float]) -> None:
        """Note when devices last said anything."""
        ...

    async def lose_unconfirmed(self, since: float) -> int:
        """Count those as lost that are said to be online and gave no sign since; return how many."""
        ...

    def forgotten(self) -> Sequence[str]:
        """Return devices whose messages the broker may still keep."""
        ...

    async def note_cleared(self, device: str) -> None:
        """Note that the broker keeps nothing of a forgotten device any more."""
        ...

    async def release(self, device: str, *, actor: str) -> Device:
        """End a quarantine: whichever box speaks next is the one.

        Raises:
            NotFoundError: There is no such device.
            ConflictError: It is not in quarantine.
        """
        ...

    async def describe(
        self, device: str, *, groups: Sequence[str] | None, labels: Mapping[str, str | None], actor: str
    ) -> Device:
        """Set the groups of a device, unless None, and some of its labels, of which None removes one.

        Raises:
            NotFoundError: There is no such device.
            InvalidRequestError: A name or a value will not do; nothing was changed.
        """
        ...

    async def forget(self, device: str, *, actor: str) -> None:
        """Remove everything about a device; with a valid certificate it comes back as a new one.

        Raises:
            NotFoundError: There is no such device.
        """
        ...


def facts_of(reported: Reported | None) -> Mapping[str, Any]:
    """Return the facts that a device reported."""
    return {} if reported is None else reported.facts
