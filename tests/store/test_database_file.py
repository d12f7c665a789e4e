from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from appliance.core.errors import StorageError
from appliance.store import database as database_module
from appliance.store.database import Database
from tests.store.children import DEADLINE_S, child, read_line, wait_until_all_have_ended
from tests.store.rows import note, subjects

WRITE_AND_ACKNOWLEDGE = """
import sys
from pathlib import Path
from appliance.store import database as database_module
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
from appliance.store import database as database_module
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


# Erasing


@pytest.mark.anyio
async def test_an_emptied_log_holds_nothing_and_the_file_everything(database: Database) -> None:
    await database.write(lambda connection: note(connection, "kept"))
    log = database.path.with_name("appliance.db-wal")
    assert b"kept" in log.read_bytes()
    await database.erase_log()
    assert log.read_bytes() == b""
    assert b"kept" in database.path.read_bytes()
    assert await database.write(lambda connection: note(connection, "later")) == 1
    assert database.read(subjects) == ["kept", "later"]


@pytest.mark.anyio
async def test_a_log_that_a_reader_needs_is_not_emptied_and_that_is_said(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_S", 0.01)
    with closing(Database(path)) as database, closing(sqlite3.connect(path, isolation_level=None)) as reader:
        await database.write(lambda connection: note(connection, "first"))
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM audit").fetchall()
        await database.write(lambda connection: note(connection, "second"))
        with pytest.raises(StorageError, match="in use"):
            await database.erase_log()
        reader.execute("ROLLBACK")
        await database.erase_log()
        assert database.read(subjects) == ["first", "second"]
