"""The schema of `fleet.db`: identity, sessions, twin, replies to commands, and the journal of updates."""

from __future__ import annotations

from pathlib import Path

from appliance.fleet.agent_schema import AGENT
from appliance.fleet.trust_schema import TRUST
from appliance.fleet.updates_schema import JOURNAL, LEFTOVERS
from appliance.store.database import Database
from appliance.store.migrations import Migration

PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("agent", AGENT),
    ("updates", JOURNAL),
    ("trust", TRUST),
    ("updates_leftover", LEFTOVERS),
)
"""Name and statements of each step, oldest first."""

MIGRATIONS = tuple(Migration(number, name, statements) for number, (name, statements) in enumerate(PARTS, start=1))


def open_fleet_database(path: Path) -> Database:
    """Open or create `fleet.db`.

    Raises:
        UnreadableDatabaseError: The file is damaged, or was written by a newer version.
        StorageError: It cannot be opened.
    """
    return Database(path, migrations=MIGRATIONS)
