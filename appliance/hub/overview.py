"""The fleet at a glance, for `hub status`, monitors and operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from appliance.core.clock import Clock
from appliance.core.errors import StorageError
from appliance.hub.device_records import DeviceStore

_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """How the devices stand.

    Attributes:
        devices: How many by status, those in quarantine only there.
        unreached: How many said nothing for a number of days, or never.
        agents: How many by version of the program.
        hardware: How many by hardware class.
        broker: Whether the hub is connected to its broker; from beside it, nobody knows.
    """

    devices: Mapping[str, int]
    unreached: int
    agents: Mapping[str, int]
    hardware: Mapping[str, int]
    broker: bool


class Overview:
    """Counts devices."""

    def __init__(
        self, devices: DeviceStore, clock: Clock, *, unreached_days: int, connected: Callable[[], bool]
    ) -> None:
        self._devices = devices
        self._clock = clock
        self._unreached_days = unreached_days
        self._connected = connected

    def fleet(self) -> Fleet:
        """Return how the devices stand."""
        quiet_since = self._clock.unix() - self._unreached_days * _DAY_S
        kinds = self._devices.kinds(quiet_since)
        return Fleet(self._devices.counts(), kinds.quiet, kinds.agents, kinds.hardware, self._connected())

    def counts(self) -> Mapping[str, int]:
        """Return how many devices there are by status."""
        return self._devices.counts()

    def unready(self) -> str:
        """Return why devices cannot be reached now, or ""."""
        try:
            self._devices.find("")
        except StorageError as error:
            return str(error)
        return "" if self._connected() else "There is no connection to the broker."
