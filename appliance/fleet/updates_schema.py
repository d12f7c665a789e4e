"""The journal's tables in `fleet.db`."""

from __future__ import annotations

JOURNAL = (
    """
    CREATE TABLE updates (
        version INTEGER PRIMARY KEY,
        job TEXT NOT NULL,
        document BLOB NOT NULL,
        progress BLOB NOT NULL,
        over INTEGER NOT NULL,
        release BLOB,
        was_present INTEGER NOT NULL DEFAULT 0
    ) STRICT
    """,
    "CREATE INDEX updates_unfinished ON updates (version) WHERE over = 0",
    """
    CREATE TABLE update_pieces (
        version INTEGER NOT NULL REFERENCES updates (version) ON DELETE CASCADE,
        digest TEXT NOT NULL CHECK (length(digest) = 64),
        length INTEGER NOT NULL CHECK (length > 0),
        hashes BLOB NOT NULL,
        PRIMARY KEY (version, digest)
    ) STRICT
    """,
    """
    CREATE TABLE update_safe (
        digest TEXT PRIMARY KEY CHECK (length(digest) = 64),
        bitmap BLOB NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE update_rolled_back (
        digest TEXT PRIMARY KEY CHECK (length(digest) = 64),
        job TEXT NOT NULL,
        code TEXT NOT NULL,
        detail TEXT NOT NULL,
        at REAL NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE update_floors (
        model TEXT PRIMARY KEY,
        counter INTEGER NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE update_attempts (
        target TEXT PRIMARY KEY,
        attempts INTEGER NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE update_reports (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        job TEXT NOT NULL,
        report BLOB NOT NULL,
        progress_of INTEGER
    ) STRICT
    """,
)
"""`progress`: an `Update` as JSON. `progress_of`: the job version, where the report only tells how far a fetch is."""

LEFTOVERS = ("ALTER TABLE updates ADD COLUMN leftover INTEGER NOT NULL DEFAULT 0",)
"""`leftover`: the job was on trial and went back, and its version is registered still."""
