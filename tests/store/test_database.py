from __future__ import annotations

import asyncio
import gc
import sqlite3
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path

import pytest

from appliance.core.errors import ConflictError, StorageError
from appliance.store import database as database_module
from appliance.store.database import Connection, Database
from tests.store.children import DEADLINE_S
from tests.store.rows import note, subjects


def insert_key(connection: Connection, key_id: str) -> None:
    insert = "INSERT INTO api_keys (id, name, token_hash, scopes, created) VALUES (?, ?, ?, '', 0)"
    connection.execute(insert, (key_id, key_id, bytes(32)))


# Writing and reading


def test_what_is_written_is_read(database: Database) -> None:
    assert database.write_blocking(lambda connection: note(connection, "雪 and 🐈")) == 1
    assert database.read(subjects) == ["雪 and 🐈"]


def test_writes_happen_in_the_order_of_arrival(database: Database) -> None:
    futures = [database.submit(lambda connection, n=n: note(connection, str(n))) for n in range(50)]  # type: ignore[misc]
    assert not wait(futures, DEADLINE_S).not_done
    assert database.read(subjects) == [str(n) for n in range(50)]


def test_a_reader_cannot_write(database: Database) -> None:
    with pytest.raises(StorageError, match="readonly"):
        database.read(lambda connection: note(connection, "sneaked in"))
    assert database.read(subjects) == []


def test_a_read_sees_one_snapshot_while_others_write(database: Database) -> None:
    def twice(connection: Connection) -> tuple[list[str], list[str]]:
        before = subjects(connection)
        database.write_blocking(lambda writer: note(writer, "meanwhile"))
        return before, subjects(connection)

    assert database.read(twice) == ([], [])
    assert database.read(subjects) == ["meanwhile"]


def test_short_lived_threads_share_the_readers(database: Database) -> None:
    descriptors = Path("/proc/self/fd")
    database.read(subjects)
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        thread = threading.Thread(target=database.read, args=(subjects,))
        thread.start()
        thread.join(DEADLINE_S)
    assert len(list(descriptors.iterdir())) == before


def test_many_threads_read_and_write_at_once(database: Database) -> None:
    def work(n: int) -> int:
        database.write_blocking(lambda connection: note(connection, str(n)))
        return len(database.read(subjects))

    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(work, range(64), timeout=DEADLINE_S))
    assert max(counts) == 64
    assert sorted(database.read(subjects), key=int) == [str(n) for n in range(64)]


def test_what_is_kept_of_a_read_is_read_anew_after_every_commit_of_whomever(database: Database) -> None:
    asked: list[None] = []

    def look(connection: Connection) -> list[str]:
        asked.append(None)
        return subjects(connection)

    assert [database.read_kept(look) for _ in range(3)] == [[], [], []]
    assert len(asked) == 1
    database.write_blocking(lambda connection: note(connection, "ours"))
    assert [database.read_kept(look) for _ in range(3)] == 3 * [["ours"]]
    assert len(asked) == 2
    with closing(sqlite3.connect(database.path)) as stranger, stranger:
        note(stranger, "another's")
    assert [database.read_kept(look) for _ in range(3)] == 3 * [["ours", "another's"]]
    assert len(asked) == 3


def test_a_read_that_failed_is_not_kept(database: Database) -> None:
    outcomes = iter([ValueError("no"), None])

    def look(connection: Connection) -> list[str]:
        if outcome := next(outcomes):
            raise outcome
        return subjects(connection)

    with pytest.raises(ValueError, match="no"):
        database.read_kept(look)
    assert database.read_kept(look) == []


def test_threads_that_write_see_their_own_writes_in_what_is_kept(database: Database) -> None:
    def work(n: int) -> bool:
        database.write_blocking(lambda connection: note(connection, str(n)))
        return str(n) in database.read_kept(subjects)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(200), timeout=DEADLINE_S))


def test_a_finished_writes_result_is_not_kept_alive(database: Database) -> None:
    class Result:
        pass

    def make(_: Connection) -> Result:
        return Result()

    future = database.submit(make)
    reference = weakref.ref(future.result(DEADLINE_S))
    del future
    # The writer drops its own reference after it has answered: a second answer proves that it went round its loop.
    database.write_blocking(lambda _: None)
    gc.collect()
    assert reference() is None


# Failing writes


def test_an_exception_rolls_back_and_reaches_the_caller(database: Database) -> None:
    def fail(connection: Connection) -> None:
        note(connection, "half")
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        database.write_blocking(fail)
    assert database.read(subjects) == []
    assert database.write_blocking(lambda connection: note(connection, "next")) == 1


def test_a_broken_constraint_is_a_conflict_and_changes_nothing(database: Database) -> None:
    database.write_blocking(lambda connection: insert_key(connection, "a"))

    def break_constraint(connection: Connection) -> None:
        note(connection, "half")
        insert_key(connection, "a")

    with pytest.raises(ConflictError, match="UNIQUE constraint failed") as refusal:
        database.write_blocking(break_constraint)
    assert isinstance(refusal.value.__cause__, sqlite3.IntegrityError)
    assert database.read(subjects) == []


def test_wrong_sql_is_our_bug_and_not_called_a_disk_error(database: Database) -> None:
    with pytest.raises(sqlite3.ProgrammingError):
        database.write_blocking(lambda connection: connection.execute("SELECT ?", ()).fetchall())


def test_a_write_that_waits_for_another_write_is_refused_instead_of_hanging(database: Database) -> None:
    def nested(connection: Connection) -> None:
        note(connection, "outer")
        database.write_blocking(lambda inner: note(inner, "inner"))

    with pytest.raises(RuntimeError, match="waits for another write"):
        database.submit(nested).result(DEADLINE_S)
    assert database.read(subjects) == []


def test_a_full_database_is_refused_with_advice_and_keeps_what_it_had(database: Database) -> None:
    database.write_blocking(lambda connection: note(connection, "small"))
    database.write_blocking(lambda connection: connection.execute("PRAGMA max_page_count=1").fetchall())
    with pytest.raises(StorageError, match="full") as refusal:
        database.write_blocking(lambda connection: note(connection, "x" * 100_000))
    assert "free some space" in refusal.value.advice
    assert database.read(subjects) == ["small"]
    database.write_blocking(lambda connection: connection.execute("PRAGMA max_page_count=100000").fetchall())
    assert database.write_blocking(lambda connection: note(connection, "after")) == 1


def test_a_process_that_holds_the_lock_too_long_is_named_in_the_advice(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_S", 0.05)
    with closing(Database(path)) as database, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="locked") as refusal:
            database.write_blocking(lambda connection: note(connection, "waiting"))
        assert "Another process" in refusal.value.advice
        other.execute("ROLLBACK")
        assert database.write_blocking(lambda connection: note(connection, "later")) == 1


# Waiting on the event loop


@pytest.mark.anyio
async def test_a_write_does_not_hold_up_the_event_loop(database: Database) -> None:
    gate = threading.Event()
    async with asyncio.TaskGroup() as group:
        writing = group.create_task(database.write(lambda _: gate.wait(DEADLINE_S)))
        await asyncio.sleep(0)  # the loop turns while the writer is blocked, or the gate would never open
        gate.set()
    assert writing.result()


@pytest.mark.anyio
async def test_a_cancelled_write_that_has_not_begun_is_dropped(database: Database) -> None:
    gate = threading.Event()
    blocking = database.submit(lambda _: gate.wait(DEADLINE_S))
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(database.write(lambda connection: note(connection, "unwanted")))
        await asyncio.sleep(0)
        waiting.cancel()
    assert waiting.cancelled()
    gate.set()
    assert blocking.result(DEADLINE_S)
    assert await database.write(lambda connection: note(connection, "wanted")) == 1
    assert database.read(subjects) == ["wanted"]


@pytest.mark.anyio
async def test_a_cancelled_write_that_has_begun_is_finished(database: Database) -> None:
    begun, gate = threading.Event(), threading.Event()

    def slow(connection: Connection) -> int:
        begun.set()
        gate.wait(DEADLINE_S)
        return note(connection, "whole")

    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(database.write(slow))
        assert await asyncio.to_thread(begun.wait, DEADLINE_S)
        waiting.cancel()
    assert waiting.cancelled()
    gate.set()
    assert await database.write(lambda connection: note(connection, "next")) == 1
    assert database.read(subjects) == ["whole", "next"]


# Closing


def test_closing_commits_what_was_accepted(path: Path) -> None:
    database = Database(path)
    gate = threading.Event()
    first = database.submit(lambda _: gate.wait(DEADLINE_S))
    accepted = [database.submit(lambda connection: note(connection, "accepted")) for _ in range(10)]
    closer = threading.Thread(target=database.close)
    closer.start()
    gate.set()
    closer.join(DEADLINE_S)
    assert first.result(0)
    assert [future.result(0) for future in accepted] == [1] * 10
    with closing(Database(path)) as again:
        assert len(again.read(subjects)) == 10


def test_a_closed_database_refuses_and_closes_twice(path: Path) -> None:
    database = Database(path)
    database.close()
    database.close()
    with pytest.raises(StorageError, match="closed"):
        database.submit(lambda _: None)
    with pytest.raises(StorageError, match="closed"):
        database.read(lambda _: None)


def test_every_write_at_the_moment_of_closing_is_answered(path: Path) -> None:
    for _ in range(20):
        database = Database(path)

        def write_until_refused(database: Database = database) -> int:
            accepted = 0
            while True:
                try:
                    future = database.submit(lambda _: None)
                except StorageError:
                    return accepted
                future.result(DEADLINE_S)
                accepted += 1

        with ThreadPoolExecutor(2) as pool:
            writers = [pool.submit(write_until_refused) for _ in range(2)]
            database.close()
            assert not wait(writers, DEADLINE_S).not_done


def test_a_read_that_ends_after_closing_leaves_no_connection_open(path: Path) -> None:
    database = Database(path)
    inside, gate = threading.Event(), threading.Event()

    def slow(connection: Connection) -> list[str]:
        inside.set()
        gate.wait(DEADLINE_S)
        return subjects(connection)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(database.read, slow)
        assert inside.wait(DEADLINE_S)
        database.close()
        gate.set()
        assert reading.result(DEADLINE_S) == []
    open_files = {str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()}
    assert str(path) not in open_files


def test_closing_says_so_when_a_write_hangs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "CLOSE_TIMEOUT_S", 0.05)
    database = Database(path)
    gate = threading.Event()
    future = database.submit(lambda _: gate.wait(DEADLINE_S))
    with pytest.raises(StorageError, match="still writing"):
        database.close()
    gate.set()
    assert future.result(DEADLINE_S)
    monkeypatch.undo()
    database.close()
