"""Releases in `hub.db`: an index of what the signed repository has, and of what was withdrawn from it."""

from __future__ import annotations

STATEMENTS: tuple[str, ...] = (
    """
    CREATE TABLE releases (
        model TEXT NOT NULL,
        counter INTEGER NOT NULL CHECK (counter > 0),
        version TEXT NOT NULL,
        target TEXT NOT NULL UNIQUE,
        length INTEGER NOT NULL CHECK (length > 0),
        digest TEXT NOT NULL CHECK (length(digest) = 64),
        document BLOB NOT NULL,
        withdrawn REAL,
        reason TEXT NOT NULL DEFAULT '',
        PRIMARY KEY (model, counter)
    ) STRICT
    """,
)
