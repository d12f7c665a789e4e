"""The schema of `batches.db`.

batches.outcome     the status to come once the output is written, or ''
batches.reached     JSON: when it first had each status
lines               those begun, by their number in the input; `answer` is NULL until they have one. Gone once the
                    output files are written
lines.tries         how often the line was begun; more than once only if the process ended during it
"""

from __future__ import annotations

from pathlib import Path

from appliance.store.database import Database
from appliance.store.migrations import Migration

MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        1,
        "batches",
        (
            """
            CREATE TABLE batches (
                key INTEGER PRIMARY KEY AUTOINCREMENT,
                id TEXT NOT NULL UNIQUE,
                tenant TEXT NOT NULL,
                endpoint TEXT NOT NULL,
                input_file TEXT NOT NULL,
                status TEXT NOT NULL,
                outcome TEXT NOT NULL DEFAULT '',
                created INTEGER NOT NULL,
                expires INTEGER NOT NULL,
                metadata TEXT NOT NULL,
                output_expires_after INTEGER,
                total INTEGER NOT NULL DEFAULT 0,
                completed INTEGER NOT NULL DEFAULT 0,
                failed INTEGER NOT NULL DEFAULT 0,
                output_file TEXT,
                error_file TEXT,
                errors TEXT NOT NULL DEFAULT '[]',
                reached TEXT NOT NULL
            ) STRICT
            """,
            "CREATE INDEX batches_tenant ON batches (tenant)",
            """
            CREATE INDEX batches_unfinished ON batches (key)
            WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
            """,
            """
            CREATE TABLE lines (
                batch INTEGER NOT NULL REFERENCES batches (key) ON DELETE CASCADE,
                number INTEGER NOT NULL,
                tries INTEGER NOT NULL,
                completed INTEGER,
                answer BLOB,
                PRIMARY KEY (batch, number)
            ) STRICT
            """,
        ),
    ),
)
"""The history of the schema, oldest first."""


def open_ledger(path: Path) -> Database:
    """Open or create `batches.db`; what is deleted from it is overwritten.

    Raises:
        UnreadableDatabaseError: The file is damaged, or was written by a newer version.
        StorageError: It cannot be opened.
    """
    return Database(path, migrations=MIGRATIONS, overwrite_deleted=True)
