"""What the agent gets from the rooms that it does not know."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from appliance.core.fleet import ReportedModel
from appliance.core.types import HealthSource
from appliance.core.wishes import ModelVersions
from appliance.fleet.actions import ModelMemory
from appliance.fleet.reported import reported_models
from appliance.observe.metrics import Metrics
from appliance.registry.versions import Registry


@dataclass(frozen=True, slots=True)
class FleetMeans:
    """Objects and functions that compose.py knows where to find.

    Attributes:
        registry: The models that there are.
        loaded: Returns the full names of the models in memory.
        memory: Loads and unloads models.
        versions: The model wishes, or None where there are none.
        health: Whether the box can serve.
        stalled: Returns the models whose thread has not gone round for too long.
        metrics: What is told of, and where the agent counts.
        restart: Begins an orderly end of the process after which it is started again.
    """

    registry: Registry
    loaded: Callable[[], Collection[str]]
    memory: ModelMemory
    versions: ModelVersions | None
    health: HealthSource
    stalled: Callable[[], Sequence[str]]
    metrics: Metrics
    restart: Callable[[], None]

    def models(self) -> list[ReportedModel]:
        """Return every registered model as it is reported."""
        return reported_models(self.registry, self.loaded())
