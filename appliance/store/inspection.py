"""What a database file holds and whether it is sound, for `appliance doctor`."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

from appliance.store.database import Connection, Database
from appliance.store.migrations import MIGRATIONS, check_history

OLDEST_SQLITE = (3, 37, 0)
"""STRICT tables came with it."""


@dataclass(frozen=True, slots=True)
class DatabaseReport:
    """A look at a database.

    Attributes:
        size: Bytes of the file.
        schema_version: The last migration that was applied; 0 when none was.
        newest_schema_version: The one that this program brings it to.
        rows: How many each table holds.
        damage: What SQLite's own check found wrong; empty when the file is sound.
    """

    size: int
    schema_version: int
    newest_schema_version: int
    rows: Mapping[str, int]
    damage: tuple[str, ...]


def inspect(database: Database) -> DatabaseReport:
    """Look at every page of the database; takes about a second a gigabyte.

    Raises:
        StorageError: It is too damaged to be looked at.
    """
    return DatabaseReport(
        size=database.path.stat().st_size,
        schema_version=database.read(lambda connection: len(check_history(connection))),
        newest_schema_version=len(MIGRATIONS),
        rows=database.read(_rows),
        damage=database.read(_damage),
    )


def sqlite_version() -> tuple[int, ...]:
    """Return the version of the SQLite library that Python uses."""
    return sqlite3.sqlite_version_info


def _rows(connection: Connection) -> dict[str, int]:
    from sqlite_utils import Database as Tables  # noqa: PLC0415  (takes 0.1 s and 24 MB, which the server has no use for)

    tables = Tables(connection, execute_plugins=False)
    return {name: tables[name].count for name in tables.table_names() if not name.startswith("sqlite_")}


def _damage(connection: Connection) -> tuple[str, ...]:
    lines = [str(row[0]) for row in connection.execute("PRAGMA quick_check(10)")]
    return () if lines == ["ok"] else tuple(lines)
