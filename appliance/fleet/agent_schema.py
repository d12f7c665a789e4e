"""The agent's part of `fleet.db`.

device.epoch          one row; counts the sessions at the broker, and is raised before each connecting
twin.hub              one row; SHA-256 of the root of trust of the hub whose twin it is: another hub begins anew
twin.desired          the document accepted last, as JSON, or NULL
twin.models_done      JSON: those of its model wishes that were handed on, which happens once; who moves a name
                      afterwards, for example an update, is not fought
twin.reported_version rises with each report
commands.state        `accepted`: nothing was done yet. `begun`: it was about to act, or did. `done`: it has its result
commands.correlation  of the message, for the answer
commands.sent         whether the broker took the answer over
"""

from __future__ import annotations

AGENT = (
    """
    CREATE TABLE device (
        key INTEGER PRIMARY KEY CHECK (key = 1),
        epoch INTEGER NOT NULL
    ) STRICT
    """,
    "INSERT INTO device (key, epoch) VALUES (1, 0)",
    """
    CREATE TABLE twin (
        key INTEGER PRIMARY KEY CHECK (key = 1),
        hub TEXT NOT NULL,
        desired BLOB,
        models_done TEXT NOT NULL,
        reported_version INTEGER NOT NULL
    ) STRICT
    """,
    "INSERT INTO twin (key, hub, desired, models_done, reported_version) VALUES (1, '', NULL, '{}', 0)",
    """
    CREATE TABLE commands (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        received REAL NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('accepted', 'begun', 'done')),
        correlation BLOB NOT NULL,
        request BLOB NOT NULL,
        result BLOB,
        sent INTEGER NOT NULL DEFAULT 0
    ) STRICT
    """,
    "CREATE INDEX commands_open ON commands (number) WHERE state <> 'done'",
)
"""Statements of the migration `agent`."""
