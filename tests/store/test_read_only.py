"""Queries that a model wrote, on files that are not ours: they read what they may, in bounded time and memory."""

from __future__ import annotations

import asyncio
import json
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from appliance.core.errors import ApplianceError, DeadlineExceededError, InvalidRequestError, StorageError
from appliance.store import read_only_child
from appliance.store.read_only import CHILD, ReadOnlyFiles, Rows

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database with a hostile name and a few rows."""
    path = tmp_path / "sales? #1%20.db"
    connection = sqlite3.connect(path)
    connection.executescript(
        """
        CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT, total REAL);
        INSERT INTO orders (customer, total) VALUES ('Ada', 12.5), ('Béla', 3.0), ('界', NULL);
        CREATE VIEW large AS SELECT * FROM orders WHERE total > 10;
        CREATE TABLE files (name TEXT, body BLOB);
        INSERT INTO files VALUES ('a', zeroblob(100000)), ('b', CAST(x'ff00' AS TEXT));
        """
    )
    connection.close()
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


async def ask(path: Path, sql: str, **limits: Any) -> Rows:
    return await ReadOnlyFiles().query(
        path, sql, **{"most_rows": 100, "most_bytes": 100_000, "deadline_s": 60.0, **limits}
    )


async def test_a_select_finds_rows(path: Path) -> None:
    found = await ask(path, "SELECT customer, round(total) AS total FROM orders ORDER BY id;")
    assert found == Rows(["customer", "total"], [["Ada", 13.0], ["Béla", 3.0], ["界", None]], False)
    assert (await ask(path, "WITH a AS (SELECT max(total) t FROM large) SELECT t FROM a")).rows == [[12.5]]
    assert (await ask(path, "VALUES (1), (2)")).rows == [[1], [2]]


async def test_blobs_and_texts_that_are_none_are_shown_by_what_they_are(path: Path) -> None:
    assert (await ask(path, "SELECT body FROM files")).rows == [["<100000 bytes>"], ["\ufffd\x00"]]
    assert (await ask(path, "SELECT 1e999, -1e999")).rows == [["inf", "-inf"]]
    ((cell,),) = (await ask(path, "SELECT group_concat(a.name || b.body) FROM files a, files b, orders")).rows
    assert isinstance(cell, str)


async def test_the_schema_is_shown_without_sqlites_own_tables(path: Path) -> None:
    tables = {each.name: each.columns for each in await ReadOnlyFiles().schema(path, deadline_s=60)}
    assert tables["orders"] == ["id INTEGER", "customer TEXT", "total REAL"]
    assert set(tables) == {"orders", "large", "files"}


async def test_rows_and_bytes_are_capped_and_it_says_so(path: Path) -> None:
    assert (await ask(path, "SELECT id FROM orders", most_rows=2)) == Rows(["id"], [[1], [2]], True)
    assert not (await ask(path, "SELECT id FROM orders", most_rows=3)).more
    few = await ask(path, "SELECT hex(body) FROM files", most_bytes=2000)
    assert few == Rows(["hex(body)"], [], True)
    ((cell,), _) = (await ask(path, "SELECT hex(body) FROM files")).rows
    assert str(cell).endswith("… <200000 characters>")


WRITES = [
    "INSERT INTO orders (customer) VALUES ('x')",
    "UPDATE orders SET total = 0",
    "DELETE FROM orders",
    "DROP TABLE orders",
    "CREATE TABLE x (a)",
    "CREATE TEMP TABLE x AS SELECT 1",
    "ALTER TABLE orders RENAME TO x",
    "REINDEX",
    "ANALYZE",
    "VACUUM",
    "BEGIN IMMEDIATE",
    "SAVEPOINT a",
    "WITH a AS (SELECT 1) INSERT INTO orders (id) SELECT * FROM a",
    "INSERT INTO orders (customer) VALUES ('x') RETURNING id",
    "SELECT 1; DELETE FROM orders",
    "SELECT 1; SELECT 2",
]
ESCAPES = [
    "ATTACH DATABASE '{other}' AS other",
    "VACUUM INTO '{other}.copy'",
    "SELECT readfile('{other}')",
    "SELECT writefile('{other}.copy', 'x')",
    "SELECT load_extension('{other}')",
    "SELECT edit('x')",
    "SELECT fts3_tokenizer('simple')",
    "SELECT * FROM pragma_database_list",
    "SELECT * FROM pragma_table_info('orders')",
    "SELECT * FROM sqlite_dbpage",
    "SELECT * FROM dbstat",
    "CREATE VIRTUAL TABLE temp.x USING csv(filename='{other}')",
    "PRAGMA query_only=OFF",
    "PRAGMA writable_schema=ON",
    "PRAGMA table_info(orders)",
    "EXPLAIN DELETE FROM orders",
    "SELECT randomblob(100)",
    "SELECT zeroblob(1000000000)",
    "SELECT printf('%1000000000d', 1)",
    "SELECT customer REGEXP '(a+)+$' FROM orders",
    "",
    "-- nothing",
    "SELECT",
    "\x00",
]


@pytest.mark.parametrize("sql", [*WRITES, *ESCAPES])
async def test_what_is_no_single_reading_select_is_refused_and_nothing_has_changed(
    path: Path, tmp_path: Path, sql: str
) -> None:
    other = tmp_path / "other.db"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE secrets (word TEXT)")
    connection.close()
    before = contents(tmp_path)
    with pytest.raises(InvalidRequestError):
        await ask(path, sql.format(other=other))
    assert contents(tmp_path) == before


ENDLESS = [
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
    "WITH RECURSIVE n(i) AS (SELECT 'x' UNION ALL SELECT i || i FROM n) SELECT count(*) FROM n",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i, hex(i) FROM n ORDER BY 2",
    "SELECT replace(hex(body), '0', hex(body)) FROM files",
    "SELECT count(*) FROM " + ", ".join(f"orders o{n}" for n in range(30)),
]


@pytest.mark.parametrize("sql", ENDLESS)
async def test_a_query_without_end_is_ended(path: Path, sql: str) -> None:
    async with asyncio.timeout(60):
        with pytest.raises((DeadlineExceededError, InvalidRequestError)):
            await ask(path, sql, deadline_s=0.3)


async def test_a_query_with_too_many_columns_or_too_long_is_refused(path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="101 columns"):
        await ask(path, "SELECT " + ", ".join(["1"] * 101))
    with pytest.raises(InvalidRequestError, match="SQLite refuses it"):
        await ask(path, "SELECT " + "+".join(["1"] * 5000))
    with pytest.raises(InvalidRequestError, match="SQLite refuses it"):
        await ask(path, "SELECT " + "1" * 200_000)


async def test_a_file_that_is_no_database_or_is_not_there_is_said_so(tmp_path: Path) -> None:
    files = ReadOnlyFiles()
    (tmp_path / "text.db").write_text("no database, but a text of some length" * 100)
    for name in ("text.db", "missing.db", "."):
        with pytest.raises(StorageError, match="cannot be read"):
            await files.schema(tmp_path / name, deadline_s=60)
    assert not (tmp_path / "missing.db").exists()


async def test_a_database_that_is_written_meanwhile_in_wal_mode_is_read(path: Path) -> None:
    writer = sqlite3.connect(path)
    writer.execute("PRAGMA journal_mode=WAL")
    writer.execute("INSERT INTO orders (customer) VALUES ('new')")
    writer.commit()
    assert (await ask(path, "SELECT count(*) FROM orders")).rows == [[4]]
    writer.close()
    assert (await ask(path, "SELECT count(*) FROM orders")).rows == [[4]]


async def test_a_caller_who_leaves_takes_the_process_with_him(path: Path) -> None:
    task = asyncio.get_running_loop().create_task(ask(path, ENDLESS[0], deadline_s=60))
    usage = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    await asyncio.wait({task}, timeout=1.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime > usage  # it ran, and was waited for


async def test_a_child_that_says_nonsense_is_not_believed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for said in ("print('<html>')", "print('[' * 100000)", "print('{\"rows\": [[{}]]}')", "import sys; sys.exit(3)"):
        fake = path.with_name("fake.py")
        fake.write_text(said)
        monkeypatch.setattr("appliance.store.read_only.CHILD", fake)
        with pytest.raises(ApplianceError):
            await ask(path, "SELECT 1")


def test_the_child_needs_nothing_but_pythons_own_library() -> None:
    found = subprocess.run(
        [sys.executable, "-I", "-S", str(CHILD)],
        input=json.dumps({"path": "/nowhere.db", "deadline_s": 1}),
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert json.loads(found.stdout) == {"error": "unable to open database file"}
    assert not found.stderr
    assert {"load_extension", "readfile", "edit", "randomblob", "zeroblob"}.isdisjoint(read_only_child.FUNCTIONS)
