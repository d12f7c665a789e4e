from __future__ import annotations

import asyncio
import gc
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from appliance.core.errors import ConflictError, StorageError
from appliance.store import database as database_module
from appliance.store.database import Connection, Database
from tests.store.children import DEADLINE_S, child, read_line, wait_until_all_have_ended

WRITE_AND_ACKNOWLEDGE = """
import sys
from pathlib import Path
from appliance.store.database import Database
database = Database(Path(sys.argv[1]))
def note(subject):
    return lambda connection: connection.execute(
        "INSERT INTO audit (at, actor, action, subject, detail) VALUES (0, 'child', 'note', ?, '')", (subject,)
    ).rowcount
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    subject = f"{sys.argv[2]} {number}"
    database.write_blocking(note(subject))
    print(subject, flush=True)
database.close()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "appliance.db"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    with closing(Database(path)) as each:
        yield each


def note(connection: Connection, subject: str) -> int:
    insert = "INSERT INTO audit (at, actor, action, subject, detail) VALUES (0, 'test', 'note', ?, '')"
    return connection.execute(insert, (subject,)).rowcount


def subjects(connection: Connection) -> list[str]:
    return [row["subject"] for row in connection.execute("SELECT subject FROM audit ORDER BY id")]


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


# The file


def test_a_new_file_and_folder_are_private(database: Database) -> None:
    database.write_blocking(lambda connection: note(connection, "a"))
    modes = {each.name: each.stat().st_mode & 0o777 for each in database.path.parent.iterdir()}
    assert modes == {"appliance.db": 0o600, "appliance.db-wal": 0o600, "appliance.db-shm": 0o600}
    assert database.path.parent.stat().st_mode & 0o777 == 0o700


def test_an_existing_folders_rights_are_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    Database(tmp_path / "appliance.db").close()
    assert tmp_path.stat().st_mode & 0o777 == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_that_root_makes_in_a_services_folder_belongs_to_the_service(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with closing(Database(tmp_path / "appliance.db")) as database:
        database.write_blocking(lambda connection: note(connection, "by root"))
        assert {(each.name, each.stat().st_uid) for each in tmp_path.iterdir()} == {
            ("appliance.db", 65534),
            ("appliance.db-wal", 65534),
            ("appliance.db-shm", 65534),
        }
    with closing(Database(tmp_path / "appliance.db", read_only=True)) as view:
        view.read(subjects)
        assert {each.stat().st_uid for each in tmp_path.iterdir()} == {65534}


def test_a_file_that_is_no_database_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "appliance.db"
    content = b"not a database at all " * 100
    path.write_bytes(content)
    with pytest.raises(StorageError, match="not a database") as refusal:
        Database(path)
    assert "backup" in refusal.value.advice
    assert path.read_bytes() == content


def test_a_damaged_page_is_reported_with_advice(path: Path) -> None:
    with closing(Database(path)) as database:
        database.write_blocking(lambda connection: note(connection, "x" * 200_000))
    page = 4096
    content = bytearray(path.read_bytes())
    for start in range(page, len(content), page):
        content[start : start + 64] = bytes(range(64))
    path.write_bytes(content)
    with pytest.raises(StorageError) as refusal, closing(Database(path)) as database:
        database.read(subjects)
    assert "damaged" in refusal.value.advice


def test_a_folder_that_cannot_be_made_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be created") as refusal:
        Database(tmp_path / "file" / "appliance.db")
    assert "--data" in refusal.value.advice


def test_an_empty_file_that_a_crash_left_becomes_the_database(tmp_path: Path) -> None:
    (tmp_path / "appliance.db").touch()
    with closing(Database(tmp_path / "appliance.db")) as database:
        assert database.read(lambda connection: connection.execute("PRAGMA journal_mode").fetchone()[0]) == "wal"


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "appliance.db").mkdir()
    with pytest.raises(StorageError, match="unable to open"):
        Database(tmp_path / "appliance.db")


def test_a_refused_database_leaves_no_thread_behind(tmp_path: Path) -> None:
    (tmp_path / "appliance.db").write_bytes(b"not a database at all " * 100)
    before = threading.active_count()
    with pytest.raises(StorageError):
        Database(tmp_path / "appliance.db")
    assert threading.active_count() == before


# Looking only


def test_looking_reads_what_others_write_and_changes_nothing(database: Database) -> None:
    with closing(Database(database.path, read_only=True)) as view:
        database.write_blocking(lambda connection: note(connection, "new"))
        assert view.read(subjects) == ["new"]
        with pytest.raises(StorageError, match="look at only"):
            view.write_blocking(lambda connection: note(connection, "refused"))
        with pytest.raises(StorageError, match="readonly"):
            view.read(lambda connection: note(connection, "refused"))
    assert database.read(subjects) == ["new"]


def test_looking_makes_neither_file_nor_folder(path: Path) -> None:
    with pytest.raises(StorageError, match="unable to open"):
        Database(path, read_only=True)
    assert not path.parent.exists()


def test_looking_migrates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "appliance.db"
    path.touch()
    with closing(Database(path, read_only=True)) as view, pytest.raises(StorageError, match="no such table"):
        view.read(subjects)
    assert path.read_bytes() == b""


def test_a_path_with_the_marks_of_a_web_address_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "100%41 #1?mode=memory" / "appliance.db"
    Database(path).close()
    assert path.exists()
    Database(path, read_only=True).close()


# Other processes, and the end of this one


def test_every_acknowledged_write_survives_sigkill(path: Path) -> None:
    Database(path).close()
    acknowledged: list[str] = []
    with child(WRITE_AND_ACKNOWLEDGE, path, "child", "1000000") as process:
        assert read_line(process) == "ready"
        assert process.stdin is not None
        process.stdin.write("go\n")
        while len(acknowledged) < 25:
            acknowledged.append(read_line(process))
        process.send_signal(signal.SIGKILL)
        while line := read_line(process):
            acknowledged.append(line)
        assert wait_until_all_have_ended([process]) == [-signal.SIGKILL]
    with closing(Database(path)) as database:
        kept = database.read(subjects)
        assert database.read(lambda connection: connection.execute("PRAGMA integrity_check").fetchone()[0]) == "ok"
    assert kept[: len(acknowledged)] == acknowledged
    assert len(kept) - len(acknowledged) <= 1  # at most the write that was on its way to being acknowledged


def test_two_processes_write_and_see_each_other(database: Database) -> None:
    with ExitStack() as stack:
        children = [stack.enter_context(child(WRITE_AND_ACKNOWLEDGE, database.path, name, "40")) for name in "ab"]
        assert [read_line(each) for each in children] == ["ready", "ready"]
        for each in children:
            assert each.stdin is not None
            each.stdin.write("go\n")
        for number in range(40):
            database.write_blocking(lambda connection, number=number: note(connection, f"c {number}"))  # type: ignore[misc]
        assert wait_until_all_have_ended(children) == [0, 0]
    for name in "abc":
        assert [each for each in database.read(subjects) if each.startswith(name)] == [f"{name} {n}" for n in range(40)]


FILL_THE_DISK = """
import sys
from pathlib import Path
from appliance.core.errors import StorageError
from appliance.store.database import Database
folder = Path(sys.argv[1])
database = Database(folder / "appliance.db")
insert = "INSERT INTO audit (at, actor, action, subject, detail) VALUES (0, '', '', ?, '')"
acknowledged = 0
try:
    while True:
        database.write_blocking(lambda connection: connection.execute(insert, ("x" * 5000,)).rowcount)
        acknowledged += 1
except StorageError as error:
    print("full" in str(error), "free some space" in error.advice, flush=True)
count = lambda connection: connection.execute("SELECT count(*) FROM audit").fetchone()[0]
print(acknowledged > 0 and database.read(count) == acknowledged, flush=True)
database.close()
database = Database(folder / "appliance.db")
print(database.read(count) == acknowledged, flush=True)
database.close()
"""


def test_a_full_disk_is_reported_and_every_acknowledged_write_is_kept(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=512k none "$1"'
    in_namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    attempt = [*in_namespace, mount, "sh", str(tmp_path)]
    if subprocess.run(attempt, capture_output=True, timeout=DEADLINE_S, check=False).returncode:
        pytest.skip("this system lets no user mount a small file system in a namespace of his own")
    result = subprocess.run(
        [*in_namespace, f'{mount} && exec "$2" -c "$3" "$1"', "sh", str(tmp_path), sys.executable, FILL_THE_DISK],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (result.stdout, result.returncode) == ("True True\nTrue\nTrue\n", 0), result.stderr
