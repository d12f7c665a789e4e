from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from appliance.core.errors import ConflictError, StorageError, UnavailableError
from appliance.core.fleet import LARGEST_BATCH_BYTES, TelemetryAck
from appliance.core.messaging import Message
from appliance.hub.ingest import Retention, TelemetryIngest
from appliance.hub.schema import MIGRATIONS
from appliance.hub.telemetry_store import Received, SqliteTelemetry
from appliance.messaging.compression import compress
from appliance.store.database import Database
from tests.hub.telemetry_batches import NOW, as_message, batch, gap, message, row, run_of
from tests.store.clocks import SetClock

pytestmark = pytest.mark.anyio
DEADLINE_S = 20.0


class Acks:
    """The hub's link, which keeps what was said and to whom."""

    def __init__(self) -> None:
        self.connected = True
        self.said: list[tuple[str, TelemetryAck]] = []
        self.before: Callable[[], None] = lambda: None

    async def publish(self, message: Message) -> None:
        if not self.connected:
            raise UnavailableError("There is no connection.")
        self.before()
        assert message.qos == 0
        self.said.append((message.topic, msgspec.json.decode(message.payload, type=TelemetryAck)))


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(tmp_path / "hub.db", migrations=MIGRATIONS)) as each:
        yield each


@pytest.fixture
def store(database: Database) -> SqliteTelemetry:
    return SqliteTelemetry(database)


@pytest.fixture
def acks() -> Acks:
    return Acks()


@asynccontextmanager
async def running(store: Any, acks: Acks, **options: Any) -> AsyncIterator[TelemetryIngest]:
    ingest = TelemetryIngest(store, acks, SetClock(NOW), **options)
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        task = tasks.create_task(ingest.run())
        yield ingest
        task.cancel()


async def take(ingest: TelemetryIngest, device: str, sent: Message) -> None:
    await ingest.handle(device, "tm", sent.topic.rpartition("/")[2], sent)


def kept(store: SqliteTelemetry, device: str | None = None) -> list[tuple[str, str, int, int]]:
    return sorted(
        (each.device, each.stream, each.boot, each.sequence) for each in store.rows(device=device, limit=9**9)[0]
    )


# Keeping


async def test_a_batch_is_kept_then_acknowledged_then_let_go(store: SqliteTelemetry, acks: Acks) -> None:
    committed: list[int] = []
    acks.before = lambda: committed.append(len(kept(store)))
    async with running(store, acks) as ingest:
        assert ingest.kinds == {"tm"}
        await take(ingest, "box", message("box", run_of(1, 5)))
    assert committed == [5]
    assert acks.said == [("ea/1/dn/box/ack", TelemetryAck("metric", 1, 5, 1))]
    (last, *_), _ = store.rows()
    assert (last.device, last.stream, last.sequence, last.kind, last.body) == ("box", "metric", 5, "x", {"number": 5})
    assert (last.at, last.received) == (NOW, NOW)


async def test_what_comes_twice_is_kept_once_and_acknowledged_twice(store: SqliteTelemetry, acks: Acks) -> None:
    async with running(store, acks) as ingest:
        for sent in (run_of(1, 5), run_of(1, 5), run_of(4, 8), run_of(1, 5, boot=2)):
            await take(ingest, "box", message("box", sent))
        await take(ingest, "other", message("other", run_of(1, 5)))
    assert [each[2:] for each in kept(store, "box")] == [
        *((1, each) for each in range(1, 9)),
        *((2, each) for each in range(1, 6)),
    ]
    assert len(kept(store, "other")) == 5
    assert len(acks.said) == 5


async def test_batches_of_many_devices_share_a_transaction(store: SqliteTelemetry, acks: Acks) -> None:
    groups: list[int] = []

    class Counting(SqliteTelemetry):
        async def keep(self, batches: Any) -> None:
            groups.append(len(batches))
            await super().keep(batches)

    async with running(Counting(store._database), acks) as ingest:
        await asyncio.gather(*(take(ingest, f"box-{n}", message(f"box-{n}", run_of(1, 3))) for n in range(200)))
    assert len(kept(store)) == 600
    assert len(groups) < 20
    assert ingest.committed == 200


async def test_a_row_that_arrives_late_or_out_of_order_is_in_its_place(store: SqliteTelemetry, acks: Acks) -> None:
    async with running(store, acks) as ingest:
        for first in (7, 1, 4):
            await take(ingest, "box", message("box", run_of(first, first + 2)))
    assert [each[3] for each in kept(store)] == list(range(1, 10))


# Health, alarms and clocks


async def test_the_latest_health_is_the_newest_by_boot_and_sequence_whatever_the_clock_said(
    store: SqliteTelemetry, acks: Acks
) -> None:
    async with running(store, acks) as ingest:
        for boot, sequence, at in ((2, 9, NOW), (2, 3, NOW + 1), (1, 50, 2.2e9), (2, 10, 0.0)):
            sent = batch(row(sequence, at=at, kind="health", at_boot=boot), stream="health", boot=boot)
            await take(ingest, "box", message("box", sent))
    health = store.latest_health()["box"]
    assert (health.boot, health.sequence, health.at) == (2, 10, 0.0)
    assert store.latest_health(["other"]) == {}
    (tally,) = store.tallies()
    assert tally.skew == NOW
    assert tally.heard == NOW


async def test_open_alarms_are_those_that_the_device_listed_last(store: SqliteTelemetry, acks: Acks) -> None:
    disk = {"since": 5.0, "severity": "critical", "detail": "1 GB is free"}
    async with running(store, acks) as ingest:
        first = batch(row(1, kind="raised", open={"disk": disk, "memory": {}}), stream="alarm")
        await take(ingest, "box", message("box", first))
        assert [each.name for each in store.open_alarms()] == ["disk", "memory"]
        second = batch(row(2, kind="cleared", open={"disk": disk}), stream="alarm")
        await take(ingest, "box", message("box", second))
        await take(ingest, "box", message("box", first))
        await take(ingest, "odd", message("odd", batch(row(1, kind="raised", open=[1]), stream="alarm")))
    (alarm,) = store.open_alarms()
    assert (alarm.device, alarm.name, alarm.since, alarm.severity, alarm.detail) == (
        "box",
        "disk",
        5.0,
        "critical",
        "1 GB is free",
    )
    assert store.open_alarms("other") == []


# Gaps


async def test_gaps_are_counted_once_and_grow(store: SqliteTelemetry, acks: Acks) -> None:
    async with running(store, acks) as ingest:
        for sent in (batch(gap(1, 5), first=1), batch(gap(1, 5), first=1), batch(gap(1, 9), row(10), first=1)):
            await take(ingest, "box", message("box", sent))
    assert store.tallies()[0].lost == 9
    assert [each[3] for each in kept(store)] == [10]


async def test_a_gap_does_not_count_what_came_before_or_comes_late(store: SqliteTelemetry, acks: Acks) -> None:
    async with running(store, acks) as ingest:
        await take(ingest, "box", message("box", run_of(3, 4)))
        await take(ingest, "box", message("box", batch(gap(1, 9), first=1)))
        assert store.tallies()[0].lost == 7
        await take(ingest, "box", message("box", run_of(5, 6)))
        await take(ingest, "box", message("box", run_of(5, 6)))
        assert store.tallies()[0].lost == 5


async def test_a_gap_of_absurd_size_counts_without_breaking_anything(store: SqliteTelemetry, acks: Acks) -> None:
    async with running(store, acks) as ingest:
        for boot in range(1, 5):
            await take(ingest, "box", message("box", batch(gap(1, 2**53, 2**53), first=1, boot=boot)))
    assert store.tallies()[0].lost == 2**53


# Refusing


def refused(acks: Acks) -> list[str]:
    return [ack.refused for _, ack in acks.said]


async def test_what_is_not_sound_is_refused_counted_and_told_and_others_are_unharmed(
    store: SqliteTelemetry, acks: Acks, caplog: pytest.LogCaptureFixture
) -> None:
    bomb = compress(bytes(2**24))
    hiding = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**24))
    deep = compress(b'{"stream":"metric","boot":1,"first":1,"last":1,"rows":' + b"[" * 100_000)
    wrong = [
        as_message("box", "metric", b""),
        as_message("box", "metric", b"\xff" * 1000),
        as_message("box", "metric", bomb),
        as_message("box", "metric", hiding),
        as_message("box", "metric", b"x" * (LARGEST_BATCH_BYTES + 1)),
        as_message("box", "metric", compress(b"{}")),
        as_message("box", "metric", compress(b'{"a":"\xff"}')),
        as_message("box", "metric", deep),
        as_message("box", "metric", compress(msgspec.json.encode(run_of(1, 3, stream="alarm")))),
        as_message("box", "metric", compress(msgspec.json.encode(batch(row(1), row(3))))),
    ]
    with caplog.at_level(logging.WARNING):
        async with running(store, acks) as ingest:
            await asyncio.gather(
                *(take(ingest, "box", each) for each in wrong),
                *(take(ingest, f"good-{n}", message(f"good-{n}", run_of(1, 3))) for n in range(5)),
            )
    assert len(kept(store)) == 15
    assert kept(store, "box") == []
    assert ingest.refused == len(wrong)
    told = [ack for topic, ack in acks.said if topic == "ea/1/dn/box/ack"]
    assert len(told) == len(wrong)
    assert all((each.boot, each.first, each.up_to) == (1, 1, 1) and each.refused for each in told)
    assert store.tallies("box")[0].refused == len(wrong)
    assert sum("is refused" in each.message for each in caplog.records) == 1  # one line a device and minute


async def test_a_refused_batch_without_a_name_or_of_no_stream_is_only_logged(
    store: SqliteTelemetry, acks: Acks
) -> None:
    async with running(store, acks) as ingest:
        await take(ingest, "box", as_message("box", "metric", b"x", None))
        await take(ingest, "box", as_message("box", "metric", b"x", "1.2"))
        await take(ingest, "box", as_message("box", "metric", b"x", "1.2." + "9" * 100))
        await take(ingest, "box", as_message("box", "no stream", b"x"))
        await take(ingest, "box", as_message("box", "", b"x"))
    assert acks.said == []
    assert ingest.refused == 5


async def test_what_the_store_will_not_keep_is_refused_and_the_rest_of_the_group_is_kept(
    store: SqliteTelemetry, acks: Acks
) -> None:
    class Picky(SqliteTelemetry):
        async def keep(self, batches: Any) -> None:
            if any(each.batch.device == "odd" for each in batches):
                raise ConflictError("The database refused the change.")
            await super().keep(batches)

    async with running(Picky(store._database), acks) as ingest:
        devices = ["box", "odd", "other"]
        await asyncio.gather(*(take(ingest, each, message(each, run_of(1, 2))) for each in devices))
    assert {each[0] for each in kept(store)} == {"box", "other"}
    assert [ack.refused for topic, ack in acks.said if "odd" in topic] == ["not_kept"]


async def test_a_full_disk_acknowledges_nothing_and_refuses_nothing(store: SqliteTelemetry, acks: Acks) -> None:
    class Full(SqliteTelemetry):
        full = True

        async def keep(self, batches: Any) -> None:
            if self.full:
                raise StorageError("The disk is full.")
            await super().keep(batches)

    full = Full(store._database)
    async with running(full, acks) as ingest:
        await take(ingest, "box", message("box", run_of(1, 2)))
        assert (acks.said, ingest.refused) == ([], 0)
        full.full = False
        await take(ingest, "box", message("box", run_of(1, 2)))
    assert len(kept(store)) == 2
    assert refused(acks) == [""]


async def test_a_refusal_that_cannot_be_counted_is_told_all_the_same(store: SqliteTelemetry, acks: Acks) -> None:
    class Full(SqliteTelemetry):
        async def note_refusal(self, device: str, code: str, at: float) -> None:
            raise StorageError("The disk is full.")

    async with running(Full(store._database), acks) as ingest:
        await take(ingest, "box", as_message("box", "metric", b"x"))
    assert refused(acks) == ["invalid_request"]


async def test_a_lost_connection_costs_the_acknowledgement_only(store: SqliteTelemetry, acks: Acks) -> None:
    acks.connected = False
    async with running(store, acks) as ingest:
        await take(ingest, "box", message("box", run_of(1, 2)))
        await take(ingest, "box", as_message("box", "metric", b"x"))
    assert len(kept(store)) == 2


async def test_what_waits_for_the_database_is_bounded(store: SqliteTelemetry, acks: Acks) -> None:
    ingest = TelemetryIngest(store, acks, SetClock(NOW))
    big = message("box", run_of(1, 400, pad="x" * 50))
    noise = as_message("box", "metric", b"x" * LARGEST_BATCH_BYTES)
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(take(ingest, "box", big)) for _ in range(2000)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(ingest._queue) < 2000
        assert ingest._held_bytes <= 8 * 1024 * 1024
        waiting += [tasks.create_task(take(ingest, "box", noise)) for _ in range(20)]
        run = tasks.create_task(ingest.run())
        await asyncio.wait(waiting)
        run.cancel()
    assert len(kept(store)) == 400
    assert ingest._held_bytes == 0


# Retention and questions


async def test_rows_go_by_age_and_by_number_and_the_newest_stay(store: SqliteTelemetry) -> None:
    from appliance.hub.batches import sound

    async def keep(sent: Any, at: float) -> None:
        await store.keep([Received(sound("box", sent.stream, sent), at)])

    await keep(run_of(1, 10), NOW - 1000)
    await keep(batch(gap(11, 20), first=11), NOW - 1000)
    await keep(run_of(21, 60), NOW)
    await keep(run_of(1, 3, stream="health"), NOW)
    assert await store.trim(received_before=NOW - 500, most_rows=30) == 20
    assert [each[3] for each in kept(store) if each[1] == "metric"] == list(range(31, 61))
    assert len([each for each in kept(store) if each[1] == "health"]) == 3
    assert await store.trim(received_before=NOW - 500, most_rows=30) == 0
    await store.forget("box")
    assert (kept(store), store.tallies(), store.latest_health()) == ([], [], {})


async def test_retention_runs_beside_the_ingest(store: SqliteTelemetry, acks: Acks) -> None:
    from appliance.hub.batches import sound

    await store.keep([Received(sound("box", "metric", run_of(1, 9)), NOW - 1e9)])
    async with running(store, acks, retention=Retention(age_s=100.0, rows=5)):
        while kept(store):  # noqa: ASYNC110  (a state without an event)
            await asyncio.sleep(0.01)


async def test_rows_of_a_time_are_found_wherever_they_lie(store: SqliteTelemetry) -> None:
    from appliance.hub.batches import sound

    assert store.rows(received_from=5.0, received_to=9.0) == ([], None)
    for at in range(20):
        await store.keep([Received(sound("box", "metric", run_of(3 * at + 1, 3 * at + 3)), float(at))])
    await store.trim(received_before=2.0, most_rows=10**9)
    for low, high in ((0, 30), (5, 9), (2, 2), (19, 19), (20, 30), (0, 1), (7.5, 7.6), (9, 5)):
        rows, more = store.rows(received_from=low, received_to=high)
        assert more is None
        assert {each.received for each in rows} == {float(at) for at in range(2, 20) if low <= at <= high}
        assert [each.sequence for each in rows] == sorted((each.sequence for each in rows), reverse=True)


async def test_rows_come_in_pages_by_device_stream_and_time(store: SqliteTelemetry, acks: Acks) -> None:
    async with running(store, acks) as ingest:
        for device in ("a", "b"):
            await take(ingest, device, message(device, run_of(1, 5)))
            await take(ingest, device, message(device, run_of(1, 2, stream="health")))
    page, more = store.rows(device="a", stream="metric", limit=3)
    assert [each.sequence for each in page] == [5, 4, 3]
    page, more = store.rows(device="a", stream="metric", limit=3, before=more)
    assert ([each.sequence for each in page], more) == ([2, 1], None)
    assert len(store.rows(stream="health")[0]) == 4
    assert store.rows(received_to=NOW - 1) == ([], None)
    assert len(store.rows(received_from=NOW)[0]) == 14
    assert store.rows(device="nobody") == ([], None)
