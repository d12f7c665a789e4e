"""How telemetry is plugged into the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from appliance.hub.http.telemetry import TelemetryResource, telemetry_operations
from appliance.hub.ingest import Retention, TelemetryIngest

if TYPE_CHECKING:
    from appliance.hub.room import Means

_DAY_S = 86_400.0


def plug_telemetry(means: Means) -> TelemetryIngest:
    """Make the part that keeps and acknowledges telemetry, and offer it to operators."""
    means.operations += telemetry_operations(TelemetryResource(means.devices, means.telemetry))
    settings = means.settings
    retention = Retention(settings.telemetry_days * _DAY_S, settings.telemetry_rows)
    return TelemetryIngest(means.telemetry, means.link, means.clock, retention=retention)
