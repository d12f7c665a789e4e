"""What can still be read of a damaged database: moved aside, and carried over into a new one row by row.

SQLite finds damage by the structure of its pages alone, so a row that is read may still be wrong: whoever uses it
checks it as ever. A table is read from both ends, so that one bad page costs little more than its own rows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

from appliance.core.errors import UnreadableDatabaseError
from appliance.store.database import Connection, Database
from appliance.store.files import storage_errors, sync_folder
from appliance.store.migrations import NEWER

_SUFFIXES = ("-wal", "-shm", "")


def check_pages(database: Database) -> None:
    """Look at every page; takes about a second a gigabyte.

    Raises:
        UnreadableDatabaseError: The file is damaged.
    """
    found = database.read(lambda connection: str(connection.execute("PRAGMA quick_check(1)").fetchone()[0]))
    if found != "ok":
        raise UnreadableDatabaseError(f"The database {database.path} is damaged: {found}.")


def is_damaged(error: UnreadableDatabaseError) -> bool:
    """Tell whether a file is to be given up, and not only too new for this program."""
    return error.code != NEWER


def aside(path: Path) -> Path:
    """Return where a damaged file is kept."""
    return path.with_name(f"{path.name}.damaged")


def move_aside(path: Path) -> None:
    """Keep a damaged database beside the place of the new one; one of before is replaced. Can be repeated after a kill.

    Raises:
        StorageError: The folder's rights or the disk do not allow it.
    """
    with storage_errors(path):
        for suffix in _SUFFIXES:
            source = path.with_name(path.name + suffix)
            if source.exists():
                source.replace(path.with_name(aside(path).name + suffix))
        sync_folder(path.parent)


def carry_over(damaged: Path, database: Database) -> dict[str, int]:
    """Copy what can be read into the same tables of a database; it wins over what is there.

    Returns:
        How many rows of each table were copied.
    """
    found: dict[str, int] = {}
    try:
        address = f"{damaged.absolute().as_uri()}?mode=rw"  # a log beside it needs more than reading
        source = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)
    except sqlite3.Error:
        return found
    with closing(source):

        def write(connection: Connection) -> None:
            for table in _tables(connection):
                found[table] = _copy(source, connection, table)

        database.write_blocking(write)
    return found


def _tables(connection: Connection) -> list[str]:
    rows = connection.execute(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%' "
        "AND name <> 'schema_migrations' ORDER BY rowid"
    )
    return [str(row[0]) for row in rows]


def _copy(source: sqlite3.Connection, connection: Connection, table: str) -> int:
    known = _columns(source, table)
    columns = [each for each in _columns(connection, table) if each in known]
    places = ", ".join("?" for _ in columns)
    copied: set[tuple[object, ...]] = set()
    for row in _rows(source, table, columns) if columns else ():
        with suppress(sqlite3.IntegrityError):  # a row that breaks the table's rules is damaged too
            sql = f"INSERT OR REPLACE INTO {table} ({', '.join(columns)}) VALUES ({places})"  # noqa: S608  (own schema)
            connection.execute(sql, row)
            copied.add(row)
    return len(copied)


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    try:
        return [str(row[1]) for row in connection.execute(f"PRAGMA table_info({table})")]
    except sqlite3.DatabaseError:
        return []  # the schema itself is damaged


def _rows(source: sqlite3.Connection, table: str, columns: list[str]) -> Iterator[tuple[object, ...]]:
    """Read a table from its beginning, and where that fails from its end."""
    for direction in ("ASC", "DESC"):
        try:
            yield from source.execute(
                f"SELECT {', '.join(columns)} FROM {table} ORDER BY {columns[0]} {direction}"  # noqa: S608  (own schema)
            )
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError:
            continue
        return
