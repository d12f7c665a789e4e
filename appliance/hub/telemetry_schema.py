"""The tables of the fleet's telemetry in `hub.db`.

Rows lie in the order of their arrival, so that the oldest are found without an index of their own; what a device sends
twice is noticed by its stream, boot and sequence. Health and alarms are kept apart as they were told last.
"""

from __future__ import annotations

TELEMETRY = (
    """
    CREATE TABLE telemetry_devices (
        number INTEGER PRIMARY KEY,
        device TEXT NOT NULL UNIQUE,
        lost INTEGER NOT NULL DEFAULT 0,
        refused INTEGER NOT NULL DEFAULT 0,
        refusal TEXT NOT NULL DEFAULT '',
        skew REAL NOT NULL DEFAULT 0,
        heard REAL NOT NULL DEFAULT 0
    ) STRICT
    """,
    """
    CREATE TABLE telemetry_rows (
        id INTEGER PRIMARY KEY,
        device INTEGER NOT NULL,
        stream INTEGER NOT NULL,
        boot INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        at REAL NOT NULL,
        received REAL NOT NULL,
        kind TEXT NOT NULL,
        body TEXT NOT NULL
    ) STRICT
    """,
    "CREATE UNIQUE INDEX telemetry_rows_once ON telemetry_rows (device, stream, boot, sequence)",
    """
    CREATE TABLE telemetry_gaps (
        device INTEGER NOT NULL,
        stream INTEGER NOT NULL,
        boot INTEGER NOT NULL,
        last INTEGER NOT NULL,
        first INTEGER NOT NULL,
        lost INTEGER NOT NULL,
        since REAL NOT NULL,
        until REAL NOT NULL,
        received REAL NOT NULL,
        PRIMARY KEY (device, stream, boot, last)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE telemetry_streams (
        device INTEGER NOT NULL,
        stream INTEGER NOT NULL,
        rows INTEGER NOT NULL,
        PRIMARY KEY (device, stream)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE telemetry_latest (
        device INTEGER NOT NULL,
        stream INTEGER NOT NULL,
        boot INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        at REAL NOT NULL,
        received REAL NOT NULL,
        kind TEXT NOT NULL,
        body TEXT NOT NULL,
        PRIMARY KEY (device, stream)
    ) STRICT, WITHOUT ROWID
    """,
)
