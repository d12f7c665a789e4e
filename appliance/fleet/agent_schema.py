"""The agent's part of `fleet.db`.

device                one row. `instance` is made up with the file, so a copy of the data folder has the same one, and
                      two boxes with one identity but an `instance` each were enrolled twice
device.epoch          counts the sessions at the broker; raised before each connecting
twin                  one row. `desired` is what was accepted last, as JSON, or NULL; `reported_version` rises with
                      each report
commands.state        `accepted`: nothing was done yet. `begun`: it was about to act, or did. `done`: it has its result
commands.correlation  of the message, for the answer
"""

from __future__ import annotations

AGENT = (
    """
    CREATE TABLE device (
        key INTEGER PRIMARY KEY CHECK (key = 1),
        instance TEXT NOT NULL,
        epoch INTEGER NOT NULL
    ) STRICT
    """,
    "INSERT INTO device (key, instance, epoch) VALUES (1, lower(hex(randomblob(16))), 0)",
    """
    CREATE TABLE twin (
        key INTEGER PRIMARY KEY CHECK (key = 1),
        desired BLOB,
        desired_version INTEGER NOT NULL,
        reported_version INTEGER NOT NULL
    ) STRICT
    """,
    "INSERT INTO twin (key, desired, desired_version, reported_version) VALUES (1, NULL, 0, 0)",
    """
    CREATE TABLE commands (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        received REAL NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('accepted', 'begun', 'done')),
        correlation BLOB NOT NULL,
        request BLOB NOT NULL,
        result BLOB
    ) STRICT
    """,
    "CREATE INDEX commands_open ON commands (number) WHERE state <> 'done'",
)
"""Statements of the migration `agent`."""
