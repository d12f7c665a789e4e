"""`cache.db`: what can be computed again. Where the other database is refused with advice, this one is made anew."""

from __future__ import annotations

import logging
from pathlib import Path

from appliance.core.errors import StorageError, UnreadableDatabaseError
from appliance.store.database import Database
from appliance.store.migrations import Migration

LOGGER = logging.getLogger("appliance.store")

MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        1,
        "embeddings",
        (
            """
            CREATE TABLE embeddings (
                id INTEGER PRIMARY KEY,
                key BLOB NOT NULL UNIQUE CHECK (length(key) = 32),
                used INTEGER NOT NULL,
                checksum INTEGER NOT NULL,
                vector BLOB NOT NULL
            ) STRICT
            """,
            "CREATE INDEX embeddings_used ON embeddings (used)",
        ),
    ),
)
"""The history of its schema, oldest first."""


def open_cache(path: Path) -> Database:
    """Open or create the file; one that is damaged, or that another version wrote, is deleted and made anew.

    Raises:
        StorageError: It cannot be opened or created, or is another program's.
    """
    try:
        return _open(path)
    except UnreadableDatabaseError as error:
        LOGGER.warning("making %s anew: %s", path, error)
        delete_cache(path)
        return _open(path)


def delete_cache(path: Path) -> None:
    """Delete the file and its log if they exist; a process that has them open keeps what it has.

    Raises:
        StorageError: They cannot be deleted.
    """
    try:
        for suffix in ("-wal", "-shm", ""):  # the log first: beside another file it would be taken for that one's
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"The file {path} cannot be deleted: {error.strerror}.", advice="Correct its owner and rights."
        ) from error


def _open(path: Path) -> Database:
    return Database(path, migrations=MIGRATIONS, durable=False)
