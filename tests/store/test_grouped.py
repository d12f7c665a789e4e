"""Writes that share a transaction, each standing or falling by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from appliance.core.errors import ConflictError, StorageError
from appliance.store.database import Connection, Database
from appliance.store.grouped import MOST_TOGETHER, GroupedWrites
from appliance.store.migrations import Migration

pytestmark = pytest.mark.anyio

NUMBERS = (Migration(1, "numbers", ("CREATE TABLE numbers (n INTEGER PRIMARY KEY) STRICT",)),)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(tmp_path / "numbers.db", migrations=NUMBERS)) as database:
        yield database


def numbers(database: Database) -> list[int]:
    return database.read(lambda each: [row["n"] for row in each.execute("SELECT n FROM numbers ORDER BY n")])


async def write(writes: GroupedWrites, n: int) -> int:
    def function(connection: Connection) -> int:
        connection.execute("INSERT INTO numbers (n) VALUES (?)", (n,))
        return n

    return await writes.write(function)


async def test_thousands_of_writes_take_a_few_transactions(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    transactions = 0
    submit = database.submit

    def counted(function: object) -> object:
        nonlocal transactions
        transactions += 1
        return submit(function)  # type: ignore[arg-type]

    monkeypatch.setattr(database, "submit", counted)
    writes = GroupedWrites(database)
    results = await asyncio.gather(*(write(writes, n) for n in range(2000)))
    assert list(results) == list(range(2000))
    assert numbers(database) == list(range(2000))
    assert transactions <= 2000 // MOST_TOGETHER + 2
    assert writes.waiting == 0


async def test_a_write_that_is_refused_takes_no_other_with_it(database: Database) -> None:
    writes = GroupedWrites(database)
    results = await asyncio.gather(*(write(writes, n % 7) for n in range(14)), return_exceptions=True)
    assert [each for each in results if isinstance(each, int)] == list(range(7)), "the first of each stands"
    assert sum(isinstance(each, Exception) for each in results) == 7
    assert numbers(database) == list(range(7))


async def test_a_write_that_fails_half_way_is_undone(database: Database) -> None:
    writes = GroupedWrites(database)

    def half(connection: Connection) -> None:
        connection.execute("INSERT INTO numbers (n) VALUES (1)")
        raise ConflictError("Not like this.")

    results = await asyncio.gather(writes.write(half), write(writes, 2), return_exceptions=True)
    assert isinstance(results[0], ConflictError)
    assert numbers(database) == [2]


async def test_who_leaves_is_passed_over_and_the_others_are_served(database: Database) -> None:
    writes = GroupedWrites(database)
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(write(writes, n)) for n in range(4)]
        await asyncio.sleep(0)
        waiting[2].cancel()
    assert numbers(database) == [0, 1, 3]


async def test_a_closed_database_fails_every_waiter_and_the_next(tmp_path: Path) -> None:
    database = Database(tmp_path / "numbers.db", migrations=NUMBERS)
    writes = GroupedWrites(database)
    database.close()
    for _ in range(2):
        with pytest.raises(StorageError):
            await write(writes, 1)
