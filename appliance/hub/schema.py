"""The schema of `hub.db`, each room's part in a file of its own."""

from __future__ import annotations

from appliance.hub import enrolment_schema
from appliance.store.migrations import MIGRATIONS as BOX_MIGRATIONS
from appliance.store.migrations import Migration

KEYS_AND_AUDIT = BOX_MIGRATIONS[0].statements + BOX_MIGRATIONS[2].statements

PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("api_keys_and_audit", KEYS_AND_AUDIT),
    ("enrolment", enrolment_schema.STATEMENTS),
)
"""Name and statements of each step, oldest first."""

MIGRATIONS = tuple(Migration(number, name, statements) for number, (name, statements) in enumerate(PARTS, start=1))
