"""The schema of `hub.db`, each room's part in a file of its own."""

from __future__ import annotations

from appliance.hub.telemetry_schema import TELEMETRY
from appliance.store.migrations import Migration

PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (("telemetry", TELEMETRY),)
"""Name and statements of each step, oldest first."""

MIGRATIONS = tuple(Migration(number, name, statements) for number, (name, statements) in enumerate(PARTS, start=1))
