from __future__ import annotations

import asyncio
import resource
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest

from appliance.core.errors import TooLargeError
from appliance.core.fleet import STREAMS, Stream
from appliance.store.outbox import LARGEST_BODY_BYTES, SMALLEST_CAP_BYTES, Limits, Outbox
from appliance.store.outbox_rows import GAP, Row, content
from tests.store.children import child, read_line
from tests.store.clocks import SetClock

pytestmark = pytest.mark.anyio
SMALL = Limits(bytes=SMALLEST_CAP_BYTES, age_s=1000.0, memory_bytes=20_000)
PAD = "x" * 1000


@asynccontextmanager
async def opened(path: Path, clock: SetClock | None = None, limits: Limits = SMALL) -> AsyncIterator[Outbox]:
    outbox = Outbox(path, clock or SetClock(), limits)
    try:
        yield outbox
    finally:
        await outbox.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "telemetry.db"


def waiting(outbox: Outbox, stream: Stream) -> list[Row]:
    """Return all rows of a stream, read as the sender does, a boot at a time."""
    rows: list[Row] = []
    after = (0, 0)
    while found := outbox.rows_after(stream, after, (2**60, 0), most=10_000, most_bytes=2**40):
        rows += found
        after = (found[-1].boot, found[-1].last)
    return rows


def sequences(rows: list[Row]) -> list[tuple[int, int]]:
    return [(each.boot, each.last) for each in rows]


def size_of(path: Path) -> int:
    return path.stat().st_size


def read(path: Path) -> bytes:
    return path.read_bytes()


def spoil(path: Path, data: bytes) -> None:
    """Put other bytes in the place of a database, without a log beside it."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


# Keeping


async def test_a_row_waits_until_it_is_acknowledged(path: Path) -> None:
    async with opened(path, SetClock(1_800_000_000.0)) as outbox:
        await outbox.append("health", "health", {"ready": True})
        (row,) = waiting(outbox, "health")
        assert (row.first, row.last, row.at, content(row)) == (1, 1, 1_800_000_000.0, {"ready": True})
        assert outbox.newest("health") == (outbox.boot, 1)
        await outbox.acknowledge("health", outbox.boot, 1, 1)
        assert waiting(outbox, "health") == []
        assert all(each.rows == each.bytes == 0 for each in outbox.held().values())


async def test_each_stream_and_boot_counts_from_one_without_holes(path: Path) -> None:
    boots = []
    for _ in range(3):
        async with opened(path) as outbox:
            boots.append(outbox.boot)
            for stream in STREAMS:
                await outbox.append(stream, "x", {})
                await outbox.append(stream, "x", {})
    assert boots == [1, 2, 3]
    async with opened(path) as outbox:
        for stream in STREAMS:
            assert sequences(waiting(outbox, stream)) == [(boot, each) for boot in boots for each in (1, 2)]
            assert outbox.newest(stream) == (3, 2)


async def test_a_body_too_large_for_a_batch_is_refused_and_nothing_is_kept(path: Path) -> None:
    async with opened(path) as outbox:
        with pytest.raises(TooLargeError, match="at most"):
            await outbox.append("alarm", "x", {"text": "x" * LARGEST_BODY_BYTES})
        await outbox.append("alarm", "x", {})
        assert sequences(waiting(outbox, "alarm")) == [(1, 1)]


async def test_a_read_ends_at_its_limits_and_at_a_hole(path: Path) -> None:
    async with opened(path) as outbox:
        for _ in range(10):
            await outbox.append("metric", "x", {"pad": PAD})
        everything = {"after": (0, 0), "until": (1, 10)}
        assert len(outbox.rows_after("metric", **everything, most=3, most_bytes=10**6)) == 3
        assert len(outbox.rows_after("metric", **everything, most=100, most_bytes=3500)) == 3
        assert len(outbox.rows_after("metric", **everything, most=100, most_bytes=1)) == 1
        await outbox.acknowledge("metric", 1, 4, 6)
        assert sequences(outbox.rows_after("metric", **everything, most=100, most_bytes=10**6)) == [
            (1, 1),
            (1, 2),
            (1, 3),
        ]
        assert sequences(outbox.rows_after("metric", (1, 6), (1, 8), most=100, most_bytes=10**6)) == [(1, 7), (1, 8)]


# Caps


async def test_the_oldest_of_the_lowest_class_goes_first_and_leaves_one_gap(path: Path) -> None:
    async with opened(path) as outbox:
        for stream in STREAMS:
            for _ in range(40):
                await outbox.append(stream, "x", {"pad": PAD})
        await outbox.flush()
        for _ in range(60):
            await outbox.append("alarm", "x", {"pad": PAD})
        held = outbox.held()
        assert sum(each.bytes for each in held.values()) <= SMALL.bytes
        assert held["alarm"].rows == 100
        assert {held["job"].rows, held["health"].rows, held["metric"].rows} == {40}
        (lost, *kept) = waiting(outbox, "sample")
        assert lost.kind == GAP
        assert (lost.first, lost.last, lost.lost) == (1, lost.last, lost.last)
        assert sequences(kept) == [(1, each) for each in range(lost.last + 1, 41)]
        assert outbox.lost == lost.lost


async def test_the_cap_is_held_to_the_row(path: Path) -> None:
    async with opened(path) as outbox:
        for number in range(400):
            await outbox.append("metric", "x", {"pad": PAD, "number": number})
            size = sum(each.bytes for each in outbox.held().values())
            assert size <= SMALL.bytes
            if outbox.lost:
                row = waiting(outbox, "metric")[-1]
                assert size > SMALL.bytes - 2 * row.size
        assert size_of(path) < 1.5 * SMALL.bytes


async def test_gaps_of_many_boots_become_one(path: Path) -> None:
    for _ in range(5):
        async with opened(path) as outbox:
            for _ in range(300):
                await outbox.append("sample", "x", {"pad": PAD})
    async with opened(path) as outbox:
        rows = waiting(outbox, "sample")
        assert [each.kind for each in rows].count(GAP) == 1
        assert rows[0].lost + len(rows) - 1 == 1500


async def test_age_is_the_programs_own_and_no_wrong_clock_deletes_a_row(path: Path) -> None:
    clock = SetClock(1_800_000_000.0)
    async with opened(path, clock) as outbox:
        await outbox.append("metric", "old", {})
        for wall in (0.0, 2_200_000_000.0, 1_700_000_000.0):
            clock.wall = wall
            await outbox.append("metric", "x", {})
        assert [each.kind for each in waiting(outbox, "metric")] == ["old", "x", "x", "x"]
        clock.pass_(SMALL.age_s + 1)
        await outbox.append("metric", "new", {})
        rows = waiting(outbox, "metric")
        assert [(each.kind, each.first, each.last) for each in rows] == [(GAP, 1, 4), ("new", 5, 5)]
    async with opened(path, SetClock(0.0)) as outbox:
        await outbox.append("metric", "next boot", {})
        assert [each.kind for each in waiting(outbox, "metric")] == [GAP, "new", "next boot"]


async def test_age_goes_on_in_the_next_boot(path: Path) -> None:
    for boot in range(4):
        clock = SetClock()
        async with opened(path, clock) as outbox:
            await outbox.append("metric", str(boot), {})
            clock.pass_(600.0)
            await outbox.append("health", "x", {})
    async with opened(path) as outbox:
        await outbox.append("health", "x", {})
        assert [each.kind for each in waiting(outbox, "metric")] == [GAP, "3"]


# Acknowledging


async def test_a_gap_that_was_made_of_rows_under_way_loses_what_the_hub_has(path: Path) -> None:
    clock = SetClock()
    async with opened(path, clock) as outbox:
        for _ in range(9):
            await outbox.append("metric", "x", {})
        clock.pass_(2000.0)
        await outbox.append("metric", "x", {})
        assert [(each.first, each.last) for each in waiting(outbox, "metric")] == [(1, 9), (10, 10)]
        await outbox.acknowledge("metric", 1, 4, 6)
        rows = waiting(outbox, "metric")
        assert [(each.first, each.last, each.lost) for each in rows] == [(1, 3, 3), (7, 9, 3), (10, 10, 0)]


async def test_an_acknowledgement_of_what_is_not_there_changes_nothing(path: Path) -> None:
    async with opened(path) as outbox:
        await outbox.append("metric", "x", {})
        await outbox.acknowledge("metric", 7, 1, 100)
        await outbox.acknowledge("health", 1, 1, 100)
        await outbox.acknowledge("metric", 1, 2, 2**53)
        assert len(waiting(outbox, "metric")) == 1


async def test_what_the_hub_refuses_becomes_a_gap_and_a_refused_gap_goes(path: Path) -> None:
    async with opened(path) as outbox:
        for _ in range(6):
            await outbox.append("metric", "x", {})
        await outbox.refuse("metric", 1, 2, 4)
        rows = waiting(outbox, "metric")
        assert [(each.kind, each.first, each.last) for each in rows] == [
            ("x", 1, 1),
            (GAP, 2, 4),
            ("x", 5, 5),
            ("x", 6, 6),
        ]
        assert outbox.lost == 3
        await outbox.refuse("metric", 1, 2, 4)
        assert [each.last for each in waiting(outbox, "metric")] == [1, 5, 6]
        await outbox.refuse("metric", 1, 2, 4)
        assert outbox.lost == 3


# Durability


async def test_alarms_are_synced_and_metrics_only_written(path: Path) -> None:
    def level() -> int:
        assert outbox._database is not None
        return outbox._database.write_blocking(
            lambda connection: int(connection.execute("PRAGMA synchronous").fetchone()[0])
        )

    async with opened(path) as outbox:
        seen = []
        for stream in ("metric", "alarm", "health", "job"):
            await outbox.append(stream, "x", {})
            seen.append(level())
        assert seen == [1, 2, 1, 2]


APPEND_UNTIL_KILLED = """
import asyncio, sys
from pathlib import Path
from appliance.core.clock import SystemClock
from appliance.store.outbox import Limits, Outbox

async def main():
    outbox = Outbox(Path(sys.argv[1]), SystemClock(), Limits(bytes=10**8))
    running = asyncio.ensure_future(outbox.run())
    number = 0
    while True:
        number += 1
        stream = ("alarm", "health", "metric", "sample")[number % 4]
        await outbox.append(stream, "x", {"number": number})
        print(outbox.boot, stream, outbox.newest(stream)[1], flush=True)
        if number % 10 == 0:
            await outbox.acknowledge("metric", outbox.boot, 1, outbox.newest("metric")[1] - 1)

asyncio.run(main())
"""


async def test_what_was_appended_survives_sigkill_and_only_samples_of_the_last_second_do_not(path: Path) -> None:
    for boot in (1, 2, 3):
        told: dict[str, int] = {}
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".boot").write_text(f"{boot - 1}" if boot > 1 else "0")
        with child(APPEND_UNTIL_KILLED, path) as process:
            first, *_ = read_line(process).split()
            for _ in range(200):
                _, stream, sequence = read_line(process).split()
                told[stream] = int(sequence)
            process.kill()
            while line := read_line(process):
                _, stream, sequence = line.split()
                told[stream] = int(sequence)
        async with opened(path, limits=Limits()) as outbox:
            for stream in ("alarm", "health", "metric"):
                last = [each.last for each in waiting(outbox, stream) if each.boot == int(first)]  # type: ignore[arg-type]
                assert last[-1] in {told[stream], told[stream] + 1}
                assert last == list(range(last[0], last[-1] + 1))
            samples = [each.last for each in waiting(outbox, "sample") if each.boot == int(first)]
            assert samples == list(range(1, len(samples) + 1))
            assert len(samples) <= told["sample"] + 1


async def test_samples_are_on_the_disk_within_a_second(path: Path) -> None:
    async with opened(path) as outbox:
        running = asyncio.ensure_future(outbox.run())
        await outbox.append("sample", "x", {})
        with closing(sqlite3.connect(path)) as other:
            async with asyncio.timeout(10):
                while not other.execute("SELECT count(*) FROM outbox").fetchone()[0]:  # noqa: ASYNC110  (another connection's state)
                    await asyncio.sleep(0.02)
        running.cancel()


# Faults


async def test_a_damaged_outbox_is_moved_aside_and_said_and_the_boot_goes_on(path: Path) -> None:
    async with opened(path) as outbox:
        await outbox.append("metric", "x", {})
    spoil(path, b"not a database at all " * 1000)
    async with opened(path) as outbox:
        assert outbox.boot == 2
        assert "not a database" in outbox.moved_aside
        await outbox.append("metric", "x", {})
        assert sequences(waiting(outbox, "metric")) == [(2, 1)]
    assert path.with_name("telemetry.db.damaged").read_bytes().startswith(b"not a database")
    async with opened(path) as outbox:
        assert (outbox.boot, outbox.moved_aside, len(waiting(outbox, "metric"))) == (3, "", 1)


async def test_a_torn_outbox_never_hinders_the_start(path: Path) -> None:
    async with opened(path) as outbox:
        for _ in range(100):
            await outbox.append("metric", "x", {"pad": PAD})
    sound = read(path)
    for size in (1, 100, 4096, 5000, len(sound) // 2, len(sound) - 1):
        spoil(path, sound[:size])
        async with opened(path) as outbox:
            await outbox.append("metric", "x", {})
            waiting(outbox, "metric")
            await outbox.append("metric", "x", {})
            assert waiting(outbox, "metric")[-1].last == outbox.newest("metric")[1]


async def test_pages_that_rot_while_it_runs_are_moved_aside_and_the_loss_is_a_gap(path: Path) -> None:
    async with opened(path, limits=Limits()) as outbox:
        for _ in range(400):
            await outbox.append("metric", "x", {"pad": PAD})
    content_ = bytearray(read(path))
    for start in range(20 * 4096, len(content_) // 2, 4096):
        content_[start : start + 64] = bytes(range(64))
    spoil(path, bytes(content_))
    async with opened(path, limits=Limits()) as outbox:
        assert outbox.held()["metric"].rows == 400
        waiting(outbox, "metric")
        await outbox.append("metric", "after", {})
        rows = waiting(outbox, "metric")
        assert [(each.kind, each.lost) for each in rows] == [(GAP, 400), ("after", 0)]
        assert outbox.moved_aside
        assert outbox.lost == 400


async def test_rows_wait_in_memory_while_the_disk_is_full(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(path) as outbox:
        await outbox.append("metric", "before", {})
        with full_disk(log_of(path).stat().st_size):
            for _ in range(5):
                await outbox.append("metric", "during", {"pad": PAD})
            await outbox.append("alarm", "disk", {})
            assert "full" in outbox.failing or "disk" in outbox.failing
            assert [each.kind for each in waiting(outbox, "metric")] == ["before", *["during"] * 5]
            assert [each.kind for each in waiting(outbox, "alarm")] == ["disk"]
            await outbox.acknowledge("alarm", 1, 1, 1)
            assert waiting(outbox, "alarm") == []
        await outbox.flush()
        assert outbox.failing == ""
        assert sum("waits in memory" in each.message for each in caplog.records) == 1
    async with opened(path) as outbox:
        assert [each.kind for each in waiting(outbox, "metric")] == ["before", *["during"] * 5]


async def test_memory_is_bounded_while_the_disk_is_full_and_the_loss_is_a_gap(path: Path) -> None:
    async with opened(path) as outbox:
        await outbox.append("health", "x", {})
        with full_disk(log_of(path).stat().st_size):
            for _ in range(50):
                await outbox.append("metric", "x", {"pad": PAD})
                await outbox.append("sample", "x", {"pad": PAD})
            assert sum(each.size for each in outbox._pending) <= SMALL.memory_bytes
        await outbox.flush()
        assert outbox.failing == ""
        metrics, samples = waiting(outbox, "metric"), waiting(outbox, "sample")
        assert metrics[-1].last == 50
        assert [(each.kind, each.first) for each in samples] == [(GAP, 1)]
        assert (samples[0].last, samples[0].lost) == (50, 50)
        assert metrics[0].kind == GAP
        assert outbox.lost == 50 + metrics[0].lost


async def test_a_folder_that_cannot_be_made_never_hinders_the_start(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    async with opened(tmp_path / "data" / "telemetry.db") as outbox:
        assert "cannot be created" in outbox.failing
        await outbox.append("alarm", "x", {})
        assert sequences(waiting(outbox, "alarm")) == [(outbox.boot, 1)]
        assert outbox.newest("alarm") == (outbox.boot, 1)
        (tmp_path / "data").unlink()
        await outbox.flush()
        assert outbox.failing == ""
        assert sequences(waiting(outbox, "alarm")) == [(outbox.boot, 1)]


async def test_a_damaged_file_that_cannot_be_moved_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(path, b"not a database at all " * 1000)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "replace", refuse)
    async with opened(path) as outbox:
        assert outbox.failing
        await outbox.append("alarm", "x", {})
        assert len(waiting(outbox, "alarm")) == 1


async def test_a_lost_boot_file_and_a_wrong_number_in_it_are_made_good_by_the_database(path: Path) -> None:
    async with opened(path) as outbox:
        await outbox.append("metric", "x", {})
    path.with_suffix(".boot").unlink()
    async with opened(path) as outbox:
        assert outbox.boot == 2
    path.with_suffix(".boot").write_text("three")
    async with opened(path) as outbox:
        assert outbox.boot == 3
    path.with_suffix(".boot").write_bytes(b"\xff\xfe")
    async with opened(path) as outbox:
        assert outbox.boot == 4


async def test_a_box_set_up_anew_begins_above_its_former_boots(path: Path) -> None:
    async with opened(path, SetClock(1_800_000_000.0)) as outbox:
        assert outbox.boot == (1_800_000_000 - 1_704_067_200) // 60 + 1


async def test_a_file_that_cannot_be_read_is_said_and_what_is_in_memory_goes_on(path: Path) -> None:
    async with opened(path) as outbox:
        await outbox.append("metric", "x", {})
        assert outbox._database is not None
        outbox._database.close()
        await outbox.append("metric", "x", {})
        assert [each.last for each in waiting(outbox, "metric")] == [2]
        assert "closed" in outbox.failing
        outbox._database = None
        await outbox.flush()
        assert outbox.failing == ""
        assert [each.last for each in waiting(outbox, "metric")] == [1, 2]


async def test_a_cap_that_holds_nothing_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        Outbox(path, SetClock(), Limits(bytes=1000))


async def test_a_cancelled_append_is_written_once(path: Path) -> None:
    async with opened(path) as outbox:
        tasks = [asyncio.ensure_future(outbox.append("health", "x", {"n": n})) for n in range(20)]
        await asyncio.sleep(0)
        for each in tasks[::2]:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await outbox.append("health", "x", {})
        rows = waiting(outbox, "health")
        assert [each.last for each in rows] == list(range(1, len(rows) + 1))
        held = outbox.held()["health"]
        assert (held.rows, held.bytes) == (len(rows), sum(each.size for each in rows))


async def test_another_programs_file_is_left_alone_and_rows_wait_in_memory(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (x)")
    async with opened(path) as outbox:
        assert "did not make" in outbox.failing
        await outbox.append("metric", "x", {})
        assert len(waiting(outbox, "metric")) == 1
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT count(*) FROM theirs").fetchone() == (0,)
