"""The tables of enrolment: claims, requests for an identity, and every certificate that was signed."""

from __future__ import annotations

STATEMENTS = (
    """
    CREATE TABLE claims (
        id TEXT PRIMARY KEY,
        secret_hash BLOB NOT NULL UNIQUE CHECK (length(secret_hash) = 32),
        created REAL NOT NULL,
        expires REAL NOT NULL,
        allowed INTEGER NOT NULL CHECK (allowed > 0),
        automatic INTEGER NOT NULL CHECK (automatic IN (0, 1)),
        revoked REAL
    ) STRICT
    """,
    """
    CREATE TABLE enrolments (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        device TEXT NOT NULL,
        instance TEXT NOT NULL,
        key_digest TEXT NOT NULL CHECK (length(key_digest) = 64),
        claim TEXT NOT NULL REFERENCES claims (id),
        state TEXT NOT NULL
            CHECK (state IN ('waiting', 'quarantined', 'approved', 'issued', 'refused', 'revoked')),
        facts TEXT NOT NULL,
        asked REAL NOT NULL,
        asked_last REAL NOT NULL,
        decided REAL,
        decided_by TEXT,
        UNIQUE (device, instance, key_digest)
    ) STRICT
    """,
    "CREATE UNIQUE INDEX enrolments_one_holder ON enrolments (device) WHERE state = 'issued'",
    "CREATE INDEX enrolments_claim ON enrolments (claim, state)",
    """
    CREATE TABLE certificates (
        serial TEXT PRIMARY KEY,
        device TEXT NOT NULL,
        key_digest TEXT NOT NULL,
        issued REAL NOT NULL,
        expires REAL NOT NULL,
        chain TEXT NOT NULL,
        revoked REAL,
        reason TEXT NOT NULL DEFAULT ''
    ) STRICT
    """,
    "CREATE INDEX certificates_device ON certificates (device, issued)",
)
