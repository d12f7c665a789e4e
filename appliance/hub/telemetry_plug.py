"""How telemetry is plugged into the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from appliance.hub.ingest import USUAL, Retention, TelemetryIngest
from appliance.hub.telemetry_store import SqliteTelemetry

if TYPE_CHECKING:
    from appliance.hub.room import Means

_DAY_S = 86_400.0


def plug_telemetry(means: Means) -> TelemetryIngest:
    """Make the part that keeps telemetry, and acknowledges it."""
    days = means.settings.telemetry_days
    retention = Retention(days * _DAY_S if days else float("inf"), USUAL.rows)
    return TelemetryIngest(SqliteTelemetry(means.database), means.link, means.clock, retention=retention)
