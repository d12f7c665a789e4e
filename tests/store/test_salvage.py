"""What is read of a damaged database: all that its structure still leads to, and nothing that breaks the rules."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from appliance.core.errors import UnreadableDatabaseError
from appliance.store.database import Database
from appliance.store.migrations import Migration
from appliance.store.salvage import aside, carry_over, check_pages, is_damaged, move_aside

PAGE = 4096
SCHEMA = (
    Migration(1, "things", ("CREATE TABLE things (id INTEGER PRIMARY KEY, size INTEGER CHECK (size > 0), what TEXT)",)),
)
WIDER = (*SCHEMA, Migration(2, "colour", ("ALTER TABLE things ADD COLUMN colour TEXT NOT NULL DEFAULT 'red'",)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a database with a thousand rows on some forty pages."""
    path = tmp_path / "old.db"
    database = Database(path, migrations=SCHEMA)
    database.write_blocking(
        lambda each: each.executemany(
            "INSERT INTO things VALUES (?, ?, ?)", [(number, number, "x" * 150) for number in range(1, 1001)]
        ).close()
    )
    database.close()
    return path


@pytest.fixture
def new(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "new.db", migrations=WIDER)
    yield database
    database.close()


def rows(database: Database) -> list[tuple[object, ...]]:
    return database.read(lambda each: [tuple(row) for row in each.execute("SELECT id, size, colour FROM things")])


def overwrite(path: Path, page: int, content: bytes = b"\xa5" * PAGE) -> None:
    with path.open("r+b") as file:
        file.seek((page - 1) * PAGE)
        file.write(content)


def test_a_sound_database_is_carried_over_whole_into_a_wider_schema(path: Path, new: Database) -> None:
    assert carry_over(path, new) == {"things": 1000}
    assert rows(new) == [(number, number, "red") for number in range(1, 1001)]


def test_a_bad_page_in_the_middle_costs_its_own_rows(path: Path, new: Database) -> None:
    pages = path.stat().st_size // PAGE
    overwrite(path, pages // 2)
    found = carry_over(path, new)["things"]
    assert 900 < found < 1000
    kept = [int(str(row[0])) for row in rows(new)]
    assert (kept[0], kept[-1], len(kept)) == (1, 1000, found)


def test_rows_that_break_the_rules_are_left_behind(path: Path, new: Database) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA ignore_check_constraints=ON")
        other.execute("UPDATE things SET size = -1 WHERE id = 7")
    assert carry_over(path, new) == {"things": 999}
    assert 7 not in [row[0] for row in rows(new)]


@pytest.mark.parametrize("content", [b"", b"no database" * 1000, None])
def test_of_what_is_no_database_nothing_is_carried_over(path: Path, new: Database, content: bytes | None) -> None:
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert sum(carry_over(path, new).values()) == 0
    assert rows(new) == []


def test_pages_are_looked_at_and_a_bad_one_is_said(path: Path) -> None:
    with closing(Database(path, migrations=SCHEMA)) as database:
        check_pages(database)
    overwrite(path, path.stat().st_size // PAGE // 2)
    with closing(Database(path, migrations=SCHEMA)) as database, pytest.raises(UnreadableDatabaseError) as caught:
        check_pages(database)
    assert "is damaged" in str(caught.value)
    assert is_damaged(caught.value)


def test_a_newer_schema_is_no_damage(path: Path) -> None:
    Database(path, migrations=WIDER).close()
    with pytest.raises(UnreadableDatabaseError) as caught:
        Database(path, migrations=SCHEMA)
    assert not is_damaged(caught.value)


def test_a_database_is_moved_aside_with_its_log_and_again_after_a_kill(path: Path) -> None:
    content = path.read_bytes()
    log = path.with_name(f"{path.name}-wal")
    log.write_bytes(b"log")
    move_aside(path)
    assert aside(path).read_bytes() == content
    assert aside(path).with_name(f"{aside(path).name}-wal").read_bytes() == b"log"
    assert not path.exists()
    assert not log.exists()
    move_aside(path)
    assert aside(path).read_bytes() == content
