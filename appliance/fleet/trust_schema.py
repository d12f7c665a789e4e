"""What a device has verified of its hub's signed repository, in `fleet.db`.

trust_anchor     the root metadata that came with the enrolment; written once
trust_documents  the newest verified metadata of each role, as it came
trust_marks      the newest version ever verified of each role, and when that was signed: apart from the metadata, so
                 that damage to one cannot turn the other back
trust_files      the content of verified targets by their SHA-256, so that they can be read without a hub
trust_seen       the newest version of the job and of the desired twin that were believed
"""

from __future__ import annotations

TRUST: tuple[str, ...] = (
    """
    CREATE TABLE trust_anchor (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        document BLOB NOT NULL
    ) STRICT
    """,
    "CREATE TABLE trust_documents (role TEXT PRIMARY KEY, document BLOB NOT NULL) STRICT, WITHOUT ROWID",
    """
    CREATE TABLE trust_marks (
        role TEXT PRIMARY KEY,
        version INTEGER NOT NULL CHECK (version > 0),
        issued REAL NOT NULL
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE trust_files (
        digest TEXT PRIMARY KEY CHECK (length(digest) = 64),
        used INTEGER NOT NULL,
        content BLOB NOT NULL
    ) STRICT
    """,
    "CREATE TABLE trust_seen (kind TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT, WITHOUT ROWID",
)
