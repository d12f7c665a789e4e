from __future__ import annotations

import signal
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from sqlite_utils import Database as SchemaReader

from appliance.core.errors import StorageError
from appliance.store.migrations import MIGRATIONS, Migration, check_history, migrate
from tests.store.children import child, wait_until_all_have_ended

DIE_AT_STATEMENT = """
import os, signal, sqlite3, sys
from appliance.store.migrations import migrate
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode=WAL")
remaining = int(sys.argv[2])
def count(statement):
    global remaining
    remaining -= 1
    if remaining < 0:
        os.kill(os.getpid(), signal.SIGKILL)
connection.set_trace_callback(count)
migrate(connection)
"""

MIGRATE_WITH_OTHERS = """
import sys
from pathlib import Path
from appliance.store.database import Database
sys.stdin.readline()
Database(Path(sys.argv[1])).close()
"""


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as each:
        yield each


def schema(connection: sqlite3.Connection) -> str:
    return str(SchemaReader(connection, execute_plugins=False).schema)


def history(connection: sqlite3.Connection) -> list[tuple[int, str]]:
    return connection.execute("SELECT number, name FROM schema_migrations ORDER BY number").fetchall()


NEWEST = [(each.number, each.name) for each in MIGRATIONS]


def test_the_numbers_are_consecutive_and_the_names_distinct() -> None:
    assert [each.number for each in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))
    assert len({each.name for each in MIGRATIONS}) == len(MIGRATIONS)


@pytest.mark.parametrize("earlier", range(len(MIGRATIONS) + 1))
def test_migrating_from_an_earlier_number_equals_the_newest_schema(
    connection: sqlite3.Connection, earlier: int
) -> None:
    migrate(connection, MIGRATIONS[:earlier])
    migrate(connection)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
        migrate(fresh)
        assert schema(connection) == schema(fresh)
    assert history(connection) == NEWEST


def test_a_key_from_before_there_were_shares_has_the_ordinary_one(connection: sqlite3.Connection) -> None:
    migrate(connection, MIGRATIONS[:2])
    insert = "INSERT INTO api_keys (id, name, token_hash, scopes, created) VALUES (?, ?, ?, 'inference', 0)"
    connection.execute(insert, ("key_1", "old", bytes(32)))
    migrate(connection)
    assert connection.execute("SELECT id, weight, highest_tier FROM api_keys").fetchall() == [("key_1", 1.0, "default")]
    for column, value in (("weight", 0.009), ("weight", 101), ("highest_tier", "royal")):
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(f"UPDATE api_keys SET {column} = ?", (value,))


def test_migrating_twice_changes_nothing_and_takes_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "appliance.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as writer, closing(sqlite3.connect(path)) as other:
        writer.execute("PRAGMA journal_mode=WAL")
        migrate(writer)
        before = writer.execute("SELECT * FROM schema_migrations").fetchall()
        other.execute("BEGIN IMMEDIATE")
        writer.execute("PRAGMA busy_timeout=0")
        migrate(writer)
        assert writer.execute("SELECT * FROM schema_migrations").fetchall() == before


def test_a_migration_that_another_process_applied_just_before_the_lock_is_not_applied_again(tmp_path: Path) -> None:
    path = tmp_path / "appliance.db"
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as slow,
        closing(sqlite3.connect(path, isolation_level=None)) as quick,
    ):
        slow.set_trace_callback(lambda statement: migrate(quick) if statement.startswith("BEGIN") else None)
        migrate(slow)
        assert history(slow) == NEWEST


def test_a_failing_migration_leaves_the_schema_as_it_was(connection: sqlite3.Connection) -> None:
    migrate(connection)
    before = schema(connection)
    bad = Migration(len(MIGRATIONS) + 1, "bad", ("CREATE TABLE half (done INTEGER)", "CREATE TABLE api_keys (id TEXT)"))
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        migrate(connection, (*MIGRATIONS, bad))
    assert not connection.in_transaction
    assert (schema(connection), history(connection)) == (before, NEWEST)


def test_a_database_of_a_newer_version_is_refused_untouched(connection: sqlite3.Connection) -> None:
    number = len(MIGRATIONS) + 1
    migrate(connection, (*MIGRATIONS, Migration(number, "from_the_future", ("CREATE TABLE future (at REAL)",))))
    before = schema(connection)
    with pytest.raises(StorageError, match=f"schema version {number}; this program knows {len(MIGRATIONS)}") as refusal:
        migrate(connection)
    assert "newer appliance" in refusal.value.advice
    assert schema(connection) == before


def test_a_history_with_a_gap_is_refused(connection: sqlite3.Connection) -> None:
    steps = tuple(Migration(number, f"step_{number}", ()) for number in (1, 2, 3))
    migrate(connection, steps)
    connection.execute("DELETE FROM schema_migrations WHERE number = 2")
    with pytest.raises(StorageError, match="not this program's: 1 step_1, 3 step_3") as refusal:
        migrate(connection, steps)
    assert "backup" in refusal.value.advice
    assert history(connection) == [(1, "step_1"), (3, "step_3")]


def test_a_history_with_another_name_is_refused(connection: sqlite3.Connection) -> None:
    migrate(connection, (Migration(1, "other", ()),))
    with pytest.raises(StorageError, match="1 other"):
        migrate(connection)
    assert history(connection) == [(1, "other")]


def test_a_longer_foreign_history_is_not_called_newer(connection: sqlite3.Connection) -> None:
    migrate(connection, tuple(Migration(number, f"step_{number}", ()) for number in range(1, len(MIGRATIONS) + 3)))
    with pytest.raises(StorageError, match="not this program's"):
        migrate(connection)


def test_another_programs_database_is_refused_untouched(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE bookmarks (url TEXT)")
    with pytest.raises(StorageError, match="'bookmarks'") as refusal:
        migrate(connection)
    assert "--data" in refusal.value.advice
    assert schema(connection) == "CREATE TABLE bookmarks (url TEXT);"


def test_sigkill_at_any_statement_leaves_the_schema_before_or_after_each_migration(tmp_path: Path) -> None:
    states = []
    for count in range(len(MIGRATIONS) + 1):
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
            migrate(fresh, MIGRATIONS[:count])
            states.append(schema(fresh))
    seen = set()
    statement = 0
    while True:
        path = tmp_path / f"{statement}.db"
        with child(DIE_AT_STATEMENT, path, str(statement)) as process:
            (status,) = wait_until_all_have_ended([process])
        with closing(sqlite3.connect(path, isolation_level=None)) as survivor:
            found = schema(survivor)
            assert found in states, f"killed at statement {statement}"
            seen.add(states.index(found))
            assert len(check_history(survivor)) == states.index(found)
            migrate(survivor)
            assert schema(survivor) == states[-1]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        statement += 1
    assert seen == set(range(len(MIGRATIONS) + 1))


def test_processes_that_start_at_once_apply_each_migration_once(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "appliance.db"
    with ExitStack() as stack:
        processes = [stack.enter_context(child(MIGRATE_WITH_OTHERS, path)) for _ in range(4)]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
        assert wait_until_all_have_ended(processes) == [0, 0, 0, 0]
    with closing(sqlite3.connect(path)) as result:
        assert history(result) == NEWEST
