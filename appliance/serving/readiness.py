"""Whether all that serves is well."""

from __future__ import annotations

from typing import Protocol

from appliance.core.types import Health, HealthSource


class Watched(HealthSource, Protocol):
    """A part with threads that may hang."""

    @property
    def stalled(self) -> list[str]:
        """Return the models whose thread has not gone round for too long."""
        ...


class Readiness:
    """Several parts as one."""

    def __init__(self, *parts: Watched) -> None:
        """Be ready when every part is."""
        self._parts = parts

    def health(self) -> Health:
        """Return that all is well, or the first part's reason why it is not."""
        each = [part.health() for part in self._parts]
        return next((health for health in each if not health.ready), each[0])

    @property
    def stalled(self) -> list[str]:
        """Return the models of all parts whose thread has not gone round for too long."""
        return [name for part in self._parts for name in part.stalled]
