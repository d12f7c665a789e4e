"""`fleet.db` torn, empty, rotten or gone: the box goes on, and what must never fall does not."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from appliance.core.clock import SystemClock
from appliance.core.errors import StorageError, UnreadableDatabaseError
from appliance.core.fleet import Job
from appliance.fleet.device_ledger import DeviceLedger
from appliance.fleet.journal import Entry, Journal
from appliance.fleet.recovery import MARGIN, Mark, MarkFile, open_or_rescue
from appliance.fleet.trust_record import TrustRecord
from appliance.registry.install import import_model
from appliance.security.trust_rules import Mark as RoleMark
from appliance.store.database import Database
from tests.fleet.links import KeptLink, until
from tests.fleet.updating import MODEL, Releases, UpdatingBox, sealed, tiny_model

pytestmark = pytest.mark.anyio
NOW = 1_800_000_000.0
PAGE = 4096


def opened(path: Path) -> tuple[Database, MarkFile, str]:
    return open_or_rescue(path, NOW)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "fleet.db"


def lived(path: Path) -> None:
    """Leave a record behind: three sessions, a floor, a model that was rolled back, marks and what was seen."""
    asyncio.run(_lived(path))
    opened(path)[0].close()  # the floor that was written above goes into the mark at the next start


async def _lived(path: Path) -> None:
    database, mark, trouble = opened(path)
    assert trouble == ""
    ledger = DeviceLedger(database, mark.raise_epoch)
    for _ in range(3):
        await ledger.next_epoch()
    record = TrustRecord(database)
    await record.anchor(b"root")
    await record.keep("timestamp", b"t" * 3000, {"root": RoleMark(1, 5.0), "timestamp": RoleMark(7, 9.0)})
    await record.keep_file("a" * 64, b"f" * 3 * PAGE)
    await record.see("job", 4)

    def write(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO update_floors VALUES ('chat', 3)")
        connection.execute("INSERT INTO update_rolled_back VALUES (?, 'job-4', 'soak_errors', 'why', 1.0)", ("b" * 64,))
        connection.executemany(
            "INSERT INTO update_reports (job, report) VALUES ('job-4', ?)", [(b"x" * 1000,) for _ in range(20)]
        )

    await database.write(write)
    database.close()


def facts(path: Path) -> tuple[int, int, str | None, int]:
    """Return the epoch, the floor, why the bad model is refused, and the number of the next report."""
    database, _, _ = opened(path)
    try:
        journal = Journal(database, SystemClock())
        sequence = database.write_blocking(
            lambda each: each.execute(
                "INSERT INTO update_reports (job, report) VALUES ('x', x'') RETURNING sequence"
            ).fetchone()["sequence"]
        )
        return DeviceLedger(database).epoch, journal.floor("chat"), journal.rolled_back("b" * 64), sequence
    finally:
        database.close()


def aside(path: Path) -> Path:
    return path.with_name("fleet.db.damaged")


def test_a_sound_record_is_opened_as_it_is(path: Path) -> None:
    lived(path)
    assert facts(path) == (3, 3, "soak_errors: why", 21)
    assert not aside(path).exists()


def test_a_record_with_a_bad_page_anywhere_keeps_what_must_never_fall(path: Path) -> None:
    """Each page in turn is overwritten; the marks hold, and of the rest at most that page's table is lost."""
    lived(path)
    sound, mark = path.read_bytes(), path.with_suffix(".mark").read_bytes()
    refused = rescued = 0
    for start in range(0, len(sound), PAGE):
        path.write_bytes(sound[:start] + random.Random(start).randbytes(PAGE) + sound[start + PAGE :])
        path.with_suffix(".mark").write_bytes(mark)
        aside(path).unlink(missing_ok=True)
        epoch, floor, why, sequence = facts(path)
        assert (epoch, floor) == (3, 3), start
        assert sequence > 20, start
        refused += why is not None
        rescued += aside(path).exists()
        database, _, trouble = opened(path)
        assert trouble == "", "it is mended once"
        database.close()
    pages = len(sound) // PAGE
    assert rescued >= pages * 3 // 4, "damage is noticed when the record is opened"
    assert refused >= pages - 6, "a bad page costs its own table, the schema or the first page all of them"


@pytest.mark.parametrize("size", [0, 1, 100, PAGE, PAGE + 1, 3 * PAGE, -PAGE, -100])
def test_a_torn_or_empty_record_keeps_what_must_never_fall(path: Path, size: int) -> None:
    lived(path)
    sound = path.read_bytes()
    path.write_bytes(sound[:size])
    epoch, floor, _, sequence = facts(path)
    assert (epoch, floor) == (3, 3)
    assert sequence > 20
    if aside(path).exists():  # what SQLite takes for empty is not kept
        assert aside(path).read_bytes() == sound[:size], "it is kept for whoever wants to know"
    else:
        assert size in (0, 1, -100)


def test_a_record_that_is_gone_keeps_what_must_never_fall(path: Path) -> None:
    lived(path)
    path.unlink()
    epoch, floor, why, sequence = facts(path)
    assert (epoch, floor, why) == (3, 3, None)
    assert sequence > MARGIN


def test_a_log_that_is_torn_anywhere_leaves_a_record_that_is_whole(path: Path, tmp_path: Path) -> None:
    """What a transaction had written is there or not, whatever is left of the write-ahead log."""
    lived(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        for number in range(4, 9):
            writer.execute("UPDATE device SET epoch = ?", (number,))
        log = path.with_name("fleet.db-wal").read_bytes()
        sound, mark = path.read_bytes(), path.with_suffix(".mark").read_bytes()
    assert len(log) > 4 * PAGE
    other = tmp_path / "other" / "fleet.db"
    other.parent.mkdir()
    found = set()
    for size in (0, 1, 31, 32, 33, *range(PAGE // 2, len(log), PAGE // 2), len(log)):
        other.write_bytes(sound)
        other.with_name("fleet.db-wal").write_bytes(log[:size])
        other.with_suffix(".mark").write_bytes(mark)
        epoch, floor, why, _ = facts(other)
        found.add(epoch)
        assert (floor, why) == (3, "soak_errors: why")
        assert not aside(other).exists()
    assert found == set(range(3, 9))


def test_a_log_with_flipped_bits_leaves_a_record_that_is_whole(path: Path, tmp_path: Path) -> None:
    lived(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        for number in range(4, 9):
            writer.execute("UPDATE device SET epoch = ?", (number,))
        log = bytearray(path.with_name("fleet.db-wal").read_bytes())
        sound, mark = path.read_bytes(), path.with_suffix(".mark").read_bytes()
    other = tmp_path / "other" / "fleet.db"
    other.parent.mkdir()
    for place in range(5, len(log), 1500):
        flipped = bytearray(log)
        flipped[place] ^= 4
        other.write_bytes(sound)
        other.with_name("fleet.db-wal").write_bytes(flipped)
        other.with_suffix(".mark").write_bytes(mark)
        epoch, floor, why, _ = facts(other)
        assert 3 <= epoch <= 8
        assert (floor, why) == (3, "soak_errors: why")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 100, b'{"epoch": -1}', b'{"epoch": "3"}', b"[" * 100_000])
def test_a_torn_mark_is_made_anew_from_the_record(path: Path, content: bytes) -> None:
    lived(path)
    path.with_suffix(".mark").write_bytes(content)
    assert facts(path)[:2] == (3, 3)
    assert MarkFile(path.with_suffix(".mark")).mark == Mark(3, 21 - 1, {"chat": 3})


def test_with_record_and_mark_both_damaged_the_box_begins_above_its_former_sessions(path: Path) -> None:
    lived(path)
    path.with_suffix(".mark").write_bytes(b"torn")
    path.write_bytes(b"no database " * 1000)
    epoch, floor, _, sequence = facts(path)
    assert epoch == (NOW - 1_704_067_200) // 60
    assert sequence > epoch
    assert floor == 0, "nothing is left to tell"


def test_an_epoch_that_cannot_be_is_not_believed(path: Path) -> None:
    lived(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("UPDATE device SET epoch = 4611686018427387907")  # 3, and one bit
    assert facts(path)[:3] == (3, 3, "soak_errors: why")


def test_a_mark_that_the_disk_did_not_take_is_written_with_the_next_change(path: Path) -> None:
    lived(path)
    file = MarkFile(path.with_suffix(".mark"))
    path.with_suffix(".mark").unlink()
    path.with_suffix(".mark").mkdir()
    asyncio.run(file.raise_epoch(4))
    path.with_suffix(".mark").rmdir()
    asyncio.run(file.raise_floor("chat", 2))
    assert MarkFile(path.with_suffix(".mark")).mark == Mark(4, 20, {"chat": 3}), "a floor never falls"


def test_a_record_of_a_newer_program_is_left_alone(path: Path) -> None:
    lived(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("INSERT INTO schema_migrations VALUES (99, 'later', 'now')")
    before = path.read_bytes()
    with pytest.raises(UnreadableDatabaseError) as caught:
        opened(path)
    assert caught.value.code == "schema_newer"
    assert path.read_bytes() == before
    assert not aside(path).exists()


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("change", range(1, 12))
def test_a_rescue_that_is_broken_off_anywhere_is_done_again(
    path: Path, change: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lived(path)
    sound = path.read_bytes()
    path.write_bytes(sound[: 2 * PAGE] + random.Random(1).randbytes(PAGE) + sound[3 * PAGE :])
    left = change
    replace, sync = Path.replace, os.fsync

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KilledError

    def replaced(self: Path, target: Path) -> Path:
        count()
        return replace(self, target)

    def synced(descriptor: int) -> None:
        count()
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replaced)
        patched.setattr(os, "fsync", synced)
        try:
            opened(path)[0].close()
        except KilledError:
            assert left == 0
    assert facts(path)[:2] == (3, 3)
    assert not path.with_suffix(".new").exists()


def test_a_disk_that_is_full_leaves_the_damaged_record_for_the_next_try(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lived(path)
    path.write_bytes(path.read_bytes()[: 2 * PAGE])
    with monkeypatch.context() as patched:

        def full(_: Path, __: Database) -> dict[str, int]:
            raise StorageError("The disk is full.")

        patched.setattr("appliance.fleet.recovery.carry_over", full)
        with pytest.raises(StorageError):
            opened(path)
    assert aside(path).stat().st_size == 2 * PAGE
    assert facts(path)[:2] == (3, 3)


# An update whose journal is damaged


@pytest.fixture
def released(tmp_path: Path) -> tuple[Releases, Job]:
    releases = Releases(tmp_path / "released")
    return releases, releases.add(tiny_model(tmp_path / "new.gguf", embedding=192))


def box_with(tmp_path: Path, releases: Releases) -> UpdatingBox:
    return UpdatingBox(tmp_path / "data", KeptLink(), releases, folders=[releases.folder])


@pytest.fixture
def installed(tmp_path: Path, released: tuple[Releases, Job]) -> None:
    box = box_with(tmp_path, released[0])
    tiny_model(tmp_path / "old.gguf", seed=0)
    import_model(tmp_path / "old.gguf", box.registry, name=MODEL, version="1")
    box.close()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("damage", ["empty", "torn", "flipped", "gone"])
@pytest.mark.parametrize("effect", ["verify", "fetch", "stage", "test", "settle"])
async def test_an_update_whose_journal_is_damaged_changes_nothing_until_its_job_comes_again(
    tmp_path: Path, released: tuple[Releases, Job], effect: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases, job = released
    first = box_with(tmp_path, releases)
    perform, reached = first.steps.perform, asyncio.Event()

    async def hold(due: str, entry: Entry) -> object:
        if due == effect:
            reached.set()
            await asyncio.Event().wait()
        return await perform(due, entry)  # type: ignore[arg-type]

    monkeypatch.setattr(first.steps, "perform", hold)
    await first.updates.take(sealed(job))
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        running = group.create_task(first.updates.run())
        await reached.wait()
        running.cancel()
    first.close()
    spoil(tmp_path / "data" / "fleet.db", damage)
    open_or_rescue(tmp_path / "data" / "fleet.db", NOW)[0].close()
    second = box_with(tmp_path, releases)
    try:
        assert second.registry.resolve(MODEL).version == ("2" if effect == "settle" else "1"), "as the wish has it"
        assert second.registry.resolve(f"{MODEL}:1").files[0].path.is_file()
        assert second.journal.floor(MODEL) == 0
        if second.journal.current() is None:
            assert await second.updates.take(sealed(job))
        assert (await second.until("confirmed", "failed", "rejected")).state == "confirmed"
        assert second.registry.resolve(MODEL).version == "2"
        assert second.journal.floor(MODEL) == 2
        assert list(second.blobs.partial_folder.iterdir()) == []
    finally:
        second.close()


def spoil(path: Path, damage: str) -> None:
    content = path.read_bytes()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "torn":
            path.write_bytes(content[: len(content) // 2])
        case "flipped":
            path.write_bytes(content[:PAGE] + bytes(each ^ 255 for each in content[PAGE:]))
        case _:
            path.unlink()


async def test_a_floor_is_in_the_mark_as_soon_as_a_release_is_confirmed(
    tmp_path: Path, released: tuple[Releases, Job]
) -> None:
    releases, job = released
    box = box_with(tmp_path, releases)
    mark = MarkFile(tmp_path / "data" / "fleet.mark")
    box.journal._copy_floor = mark.raise_floor
    try:
        await box.updates.take(sealed(job))
        assert (await box.until("confirmed", "failed")).state == "confirmed"
        path = tmp_path / "data" / "fleet.mark"
        await until(path.exists)  # it is written after the journal, which `confirmed` was read from
    finally:
        box.close()
    assert msgspec.json.decode(path.read_bytes(), type=Mark).floors == {MODEL: 2}
