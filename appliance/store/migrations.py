"""The schema of `appliance.db` as numbered steps, each applied with its record in one transaction.

A released migration is never edited: a change of schema is a new one at the end. Every statement runs inside
`BEGIN IMMEDIATE`, so a crash leaves the schema as it was before the migration or as it is after, and of two processes
that start at once one waits and then finds the work done.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from appliance.core.errors import StorageError, UnreadableDatabaseError

NEWER = "schema_newer"
"""Code of the error that a database of a newer program is answered with."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema.

    Attributes:
        number: 1, 2, 3 and so on without a gap.
        name: What it adds, `snake_case`; recorded beside the number so that a foreign history is noticed.
        statements: SQL, one statement each.
    """

    number: int
    name: str
    statements: tuple[str, ...]


MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        1,
        "api_keys_and_audit",
        (
            """
            CREATE TABLE api_keys (
                id TEXT PRIMARY KEY,
                name TEXT NOT NULL,
                token_hash BLOB NOT NULL UNIQUE CHECK (length(token_hash) = 32),
                scopes TEXT NOT NULL,
                created REAL NOT NULL,
                last_used REAL,
                revoked REAL
            ) STRICT
            """,
            "CREATE UNIQUE INDEX api_keys_valid_name ON api_keys (name) WHERE revoked IS NULL",
            """
            CREATE TABLE audit (
                id INTEGER PRIMARY KEY AUTOINCREMENT,
                at REAL NOT NULL,
                actor TEXT NOT NULL,
                action TEXT NOT NULL,
                subject TEXT NOT NULL,
                detail TEXT NOT NULL
            ) STRICT
            """,
            """
            CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit
            BEGIN SELECT RAISE(ABORT, 'the audit table is append-only'); END
            """,
            """
            CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit
            BEGIN SELECT RAISE(ABORT, 'the audit table is append-only'); END
            """,
        ),
    ),
    Migration(
        2,
        "models",
        (
            """
            CREATE TABLE models (
                id INTEGER PRIMARY KEY AUTOINCREMENT,
                name TEXT NOT NULL,
                version TEXT NOT NULL,
                kind TEXT NOT NULL,
                task TEXT NOT NULL,
                licence TEXT NOT NULL,
                created INTEGER NOT NULL,
                architecture TEXT NOT NULL,
                quantisation TEXT NOT NULL,
                context_length INTEGER NOT NULL,
                minimum_memory INTEGER NOT NULL,
                chat_template TEXT,
                stop TEXT NOT NULL,
                default_context INTEGER,
                UNIQUE (name, version)
            ) STRICT
            """,
            """
            CREATE TABLE model_files (
                model_id INTEGER NOT NULL REFERENCES models (id) ON DELETE CASCADE,
                role TEXT NOT NULL,
                sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
                size INTEGER NOT NULL CHECK (size > 0),
                PRIMARY KEY (model_id, role)
            ) STRICT
            """,
            "CREATE INDEX model_files_sha256 ON model_files (sha256)",
        ),
    ),
    Migration(
        3,
        "api_key_shares",
        (
            "ALTER TABLE api_keys ADD COLUMN weight REAL NOT NULL DEFAULT 1.0 CHECK (weight BETWEEN 0.01 AND 100)",
            """
            ALTER TABLE api_keys ADD COLUMN highest_tier TEXT NOT NULL DEFAULT 'default'
            CHECK (highest_tier IN ('priority', 'default', 'flex'))
            """,
        ),
    ),
    Migration(
        4,
        "adapters",
        (
            """
            CREATE TABLE adapters (
                id INTEGER PRIMARY KEY AUTOINCREMENT,
                base_id INTEGER NOT NULL REFERENCES models (id) ON DELETE RESTRICT,
                name TEXT NOT NULL,
                licence TEXT NOT NULL,
                created INTEGER NOT NULL,
                quantisation TEXT NOT NULL,
                rank INTEGER NOT NULL CHECK (rank > 0),
                minimum_memory INTEGER NOT NULL,
                sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
                size INTEGER NOT NULL CHECK (size > 0),
                UNIQUE (base_id, name)
            ) STRICT
            """,
            "CREATE INDEX adapters_sha256 ON adapters (sha256)",
        ),
    ),
    Migration(5, "model_signatures", ("ALTER TABLE models ADD COLUMN signature TEXT",)),
    Migration(
        6,
        "wishes",
        (
            """
            CREATE TABLE wishes (
                name TEXT PRIMARY KEY,
                version TEXT NOT NULL,
                previous TEXT,
                state TEXT NOT NULL CHECK (state IN ('trial', 'confirmed', 'rolled_back')),
                reason TEXT NOT NULL,
                code TEXT NOT NULL,
                boots INTEGER NOT NULL CHECK (boots >= 0),
                since REAL NOT NULL,
                origin TEXT NOT NULL,
                soak TEXT NOT NULL,
                criteria TEXT NOT NULL,
                baseline REAL NOT NULL DEFAULT 0,
                serving TEXT NOT NULL DEFAULT '',
                fact TEXT NOT NULL DEFAULT ''
            ) STRICT
            """,
        ),
    ),
)
"""The history of the schema, oldest first."""

KEYS_AND_AUDIT = MIGRATIONS[0].statements + MIGRATIONS[2].statements
"""API keys and the audit as a database of another program has them, whose history begins with them."""

_RECORD_TABLE = """
    CREATE TABLE IF NOT EXISTS schema_migrations (
        number INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        applied_at TEXT NOT NULL
    ) STRICT
"""


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring the schema up to date; does not take the write lock when there is nothing to do.

    Args:
        connection: In autocommit mode (`isolation_level=None`).
        migrations: The wanted history, oldest first.

    Raises:
        UnreadableDatabaseError: A newer or a foreign version wrote the database; nothing was changed.
        StorageError: It is another program's.
    """
    for migration in migrations[len(check_history(connection, migrations)) :]:
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Another process may have been quicker between the check above and the lock.
            if len(check_history(connection, migrations)) < migration.number:
                _apply(connection, migration)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def check_history(connection: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> list[str]:
    """Return the names of the applied migrations, oldest first, having checked that they begin `migrations`.

    Raises:
        UnreadableDatabaseError: A newer or a foreign version wrote the database.
        StorageError: It is another program's.
    """
    tables = {str(name) for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if "schema_migrations" not in tables:
        if tables:
            raise StorageError(
                f"The database holds {len(tables)} tables that the appliance did not make ({min(tables)!r}).",
                advice="Name another data folder with --data, or move that file away.",
            )
        return []
    applied = [(int(number), str(name)) for number, name in _records(connection)]
    wanted = [(each.number, each.name) for each in migrations]
    if len(applied) > len(wanted) and applied[: len(wanted)] == wanted:
        raise UnreadableDatabaseError(
            f"The database has schema version {applied[-1][0]}; this program knows {len(wanted)}.",
            advice="A newer appliance wrote it. Install that version again, or restore a backup from before it.",
            code=NEWER,
        )
    if applied != wanted[: len(applied)]:
        found = ", ".join(f"{number} {name}" for number, name in applied)
        raise UnreadableDatabaseError(
            f"The database's schema history is not this program's: {found}.",
            advice="Another program or an unreleased version wrote it. Restore a backup, or use another data folder.",
        )
    return [name for _, name in applied]


def _records(connection: sqlite3.Connection) -> list[tuple[int, str]]:
    return connection.execute("SELECT number, name FROM schema_migrations ORDER BY number").fetchall()


def _apply(connection: sqlite3.Connection, migration: Migration) -> None:
    connection.execute(_RECORD_TABLE)
    for statement in migration.statements:
        connection.execute(statement)
    connection.execute(
        "INSERT INTO schema_migrations (number, name, applied_at) VALUES (?, ?, strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))",
        (migration.number, migration.name),
    )
