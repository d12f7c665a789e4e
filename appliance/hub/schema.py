"""The schema of `hub.db`, each room's part in a file of its own."""

from __future__ import annotations

from appliance.hub import (
    devices_schema,
    enrolment_schema,
    key_watch_schema,
    releases_schema,
    rollouts_schema,
    telemetry_schema,
)
from appliance.store.migrations import KEYS_AND_AUDIT, Migration

PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("api_keys_and_audit", KEYS_AND_AUDIT),
    ("devices", devices_schema.STATEMENTS),
    ("enrolment", enrolment_schema.STATEMENTS),
    ("telemetry", telemetry_schema.TELEMETRY),
    ("releases", releases_schema.STATEMENTS),
    ("rollouts", rollouts_schema.STATEMENTS),
    ("key_watch", key_watch_schema.STATEMENTS),
)
"""Name and statements of each step, oldest first."""

MIGRATIONS = tuple(Migration(number, name, statements) for number, (name, statements) in enumerate(PARTS, start=1))
