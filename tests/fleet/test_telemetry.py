"""Telemetry over a wire that loses, doubles and reorders; the real broker is in `test_telemetry_broker.py`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from appliance.core.clock import SystemClock
from appliance.core.fleet import LARGEST_BATCH_BYTES, STREAMS, Stream, TelemetryAck, TelemetryBatch, down
from appliance.core.messaging import Message
from appliance.fleet.telemetry import MOST_ROWS, Telemetry
from appliance.hub.telemetry_store import SqliteTelemetry
from appliance.messaging.compression import decompress
from appliance.store.outbox import SMALLEST_CAP_BYTES, Limits, Outbox
from tests.fleet.telemetry_ends import DEADLINE_S, QUICK, Wire, always, device, hub, is_empty, until
from tests.store.clocks import SetClock

pytestmark = pytest.mark.anyio


@dataclass
class Ends:
    wire: Wire
    telemetry: Telemetry
    outbox: Outbox
    store: SqliteTelemetry

    def kept(self) -> dict[tuple[str, int, int], dict[str, Any]]:
        rows, _ = self.store.rows(limit=10**9)
        places = [(each.stream, each.boot, each.sequence) for each in rows]
        assert len(set(places)) == len(places)
        return {(each.stream, each.boot, each.sequence): each.body for each in rows}

    def batches(self) -> list[TelemetryBatch]:
        return [msgspec.json.decode(decompress(each.payload), type=TelemetryBatch) for each in self.wire.seen]


@asynccontextmanager
async def ends(folder: Path, **options: Any) -> AsyncIterator[Ends]:
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks, AsyncExitStack() as stack:
        wire = Wire(tasks)
        wire.ingest, store = await stack.enter_async_context(hub(folder / "hub.db", wire))
        wire.telemetry = await stack.enter_async_context(device(folder / "telemetry.db", wire, **options))
        yield Ends(wire, wire.telemetry, wire.telemetry._outbox, store)


async def fill(outbox: Outbox, count: int, streams: tuple[Stream, ...] = STREAMS) -> None:
    for number in range(count):
        for stream in streams:
            await outbox.append(stream, "x", {"number": number})


async def test_what_is_appended_reaches_the_hub_and_leaves_the_outbox(tmp_path: Path) -> None:
    async with ends(tmp_path) as each:
        await each.telemetry.connected()
        await fill(each.outbox, 20)
        await until(lambda: is_empty(each.outbox))
        assert each.kept() == {(s, 1, n + 1): {"number": n} for s in STREAMS for n in range(20)}
        assert all(m.qos == 1 and not m.retain and m.expiry_s == 600 for m in each.wire.seen)
        assert all(m.topic == f"ea/1/up/box/tm/{b.stream}" for m, b in zip(each.wire.seen, each.batches(), strict=True))


async def test_nothing_is_sent_before_the_connection_nor_while_the_hub_is_down(tmp_path: Path) -> None:
    welcome = asyncio.Event()

    async def hub_is_up() -> None:
        await welcome.wait()

    async with ends(tmp_path, welcome=hub_is_up) as each:
        await fill(each.outbox, 3)
        await asyncio.sleep(0.05)
        assert each.wire.seen == []
        await each.telemetry.connected()
        await asyncio.sleep(0.05)
        assert each.wire.seen == []
        welcome.set()
        await until(lambda: is_empty(each.outbox))


async def test_what_was_under_way_when_the_hub_went_away_goes_again_as_soon_as_it_is_back(tmp_path: Path) -> None:
    welcome = asyncio.Event()
    welcome.set()

    async def hub_is_up() -> None:
        await welcome.wait()

    limits = replace(QUICK, shortest_wait_s=60.0)
    async with ends(tmp_path, limits=limits, welcome=hub_is_up) as each:
        each.wire.up = lambda _: 0
        await fill(each.outbox, 2, ("metric",))
        await each.telemetry.connected()
        await until(lambda: len(each.wire.seen) == 1)
        welcome.clear()
        await fill(each.outbox, 1, ("health",))
        await asyncio.sleep(0.7)
        each.wire.up = lambda _: 1
        welcome.set()
        await until(lambda: is_empty(each.outbox), 30.0)
        assert [batch.stream for batch in each.batches()] == ["metric", "health", "metric"]


async def test_rows_that_are_acknowledged_by_a_late_word_are_left_out_of_the_repetition(tmp_path: Path) -> None:
    async with ends(tmp_path) as each:
        each.wire.up = lambda _: 0
        await each.outbox.append("health", "x", {})
        await fill(each.outbox, 9, ("metric",))
        await each.telemetry.connected()
        await until(lambda: len(each.wire.seen) >= 2)
        each.wire.seen.clear()
        await each.outbox.acknowledge("metric", 1, 4, 6)
        each.wire.up = lambda _: 1
        await until(lambda: is_empty(each.outbox))
        found = [(batch.first, batch.last) for batch in each.batches() if batch.stream == "metric"]
        assert found[-2:] == [(1, 3), (7, 9)]


async def test_what_went_elsewhere_meanwhile_is_passed_over(tmp_path: Path) -> None:
    welcome = asyncio.Event()

    async def hub_is_up() -> None:
        await welcome.wait()

    async with ends(tmp_path, welcome=hub_is_up) as each:
        await fill(each.outbox, 5, ("metric",))
        await each.telemetry.connected()
        await fill(each.outbox, 5, ("sample", "metric"))
        await each.outbox.acknowledge("metric", 1, 1, 10)
        await each.outbox.acknowledge("sample", 1, 1, 5)
        welcome.set()
        await fill(each.outbox, 1, ("metric",))
        await until(lambda: is_empty(each.outbox))
        assert [(batch.first, batch.last) for batch in each.batches()] == [(11, 11)]


async def test_the_newest_health_goes_first_then_alarms_and_jobs_then_the_history(tmp_path: Path) -> None:
    async with ends(tmp_path) as each:
        await fill(each.outbox, 30)
        await each.telemetry.connected()
        await until(lambda: is_empty(each.outbox))
        order = [(batch.stream, batch.first, batch.last) for batch in each.batches()]
        assert order[0] == ("health", 30, 30)
        assert [stream for stream, *_ in order] == ["health", "alarm", "job", "health", "metric", "sample"]
        assert order[3] == ("health", 1, 29)


async def test_a_batch_is_lost_after_the_broker_confirmed_it(tmp_path: Path) -> None:
    async with ends(tmp_path) as each:
        chance = random.Random(1)
        each.wire.up = lambda _: int(chance.random() > 0.4)
        each.wire.down = lambda _: int(chance.random() > 0.4)
        await each.telemetry.connected()
        for _ in range(8):
            await fill(each.outbox, 3)
        await until(lambda: is_empty(each.outbox))
        assert len(each.kept()) == 24 * len(STREAMS)
        assert each.telemetry.published > 10


async def test_batches_and_acknowledgements_come_twice(tmp_path: Path) -> None:
    async with ends(tmp_path) as each:
        each.wire.up = each.wire.down = lambda _: 2
        await each.telemetry.connected()
        await fill(each.outbox, 30)
        await until(lambda: is_empty(each.outbox))
        assert len(each.kept()) == 30 * len(STREAMS)


async def test_batches_arrive_in_the_wrong_order(tmp_path: Path) -> None:
    async with ends(tmp_path, limits=replace(QUICK, shortest_wait_s=60.0)) as each:
        each.wire.held = []
        await fill(each.outbox, 1200, ("metric",))
        await fill(each.outbox, 10, ("health",))
        await each.telemetry.connected()
        await until(lambda: len(each.wire.held or []) == 5)
        each.wire.release()
        await until(lambda: is_empty(each.outbox))
        assert [n for s, _, n in sorted(each.kept()) if s == "metric"] == list(range(1, 1201))
        assert each.store.latest_health()["box"].sequence == 10


async def test_rows_that_are_evicted_while_their_batch_is_under_way_are_told_once(tmp_path: Path) -> None:
    limits = Limits(bytes=SMALLEST_CAP_BYTES)
    async with ends(tmp_path, outbox_limits=limits) as each:
        each.wire.held = []
        pad = {"pad": "x" * 1000}
        for _ in range(200):
            await each.outbox.append("metric", "x", pad)
        await each.telemetry.connected()
        await until(lambda: bool(each.wire.held))
        for _ in range(300):
            await each.outbox.append("metric", "x", pad)
        assert each.outbox.lost > 200
        each.wire.release()
        await until(lambda: is_empty(each.outbox))
        present = {n for _, _, n in each.kept()}
        assert set(range(1, 101)) <= present
        (tally,) = each.store.tallies()
        assert tally.lost == 500 - len(present)


async def test_what_the_hub_refuses_goes_as_a_gap_and_does_not_come_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with ends(tmp_path) as each:

        def spoil(message: Message) -> int:
            spoiled.append(message)
            if len(spoiled) > 1:
                return 1
            assert each.wire.ingest is not None
            each.wire._arrive(replace(message, payload=b"spoiled"))
            return 0

        spoiled: list[Message] = []
        each.wire.up = spoil
        await fill(each.outbox, 5, ("metric",))
        await each.telemetry.connected()
        await until(lambda: is_empty(each.outbox))
        assert each.telemetry.refused == 1
        assert each.kept() == {}
        (tally,) = each.store.tallies()
        assert (tally.lost, tally.refused) == (5, 1)
        await fill(each.outbox, 5, ("metric",))
        await until(lambda: is_empty(each.outbox))
        assert len(each.kept()) == 5
        assert "refuses rows 1 to 5 of metric" in caplog.text


async def test_a_new_connection_sends_what_was_not_acknowledged_the_newest_health_first(tmp_path: Path) -> None:
    async with ends(tmp_path, limits=replace(QUICK, shortest_wait_s=60.0)) as each:
        each.wire.up = lambda _: 0
        await fill(each.outbox, 20)
        await each.telemetry.connected()
        await until(lambda: len(each.wire.seen) == 6)
        each.wire.connected = False
        await fill(each.outbox, 1)
        await asyncio.sleep(0.02)
        each.wire.connected = True
        each.wire.up = lambda _: 1
        each.wire.seen.clear()
        await each.telemetry.connected()
        await until(lambda: is_empty(each.outbox))
        assert (each.batches()[0].stream, each.batches()[0].first) == ("health", 21)
        assert len(each.kept()) == 21 * len(STREAMS)


async def test_live_rows_pass_a_history_that_trickles(tmp_path: Path) -> None:
    limits = replace(QUICK, history_rate=2000.0, shortest_wait_s=60.0)
    async with ends(tmp_path, limits=limits) as each:
        for number in range(4000):
            await each.outbox.append("sample", "x", {"number": number, "noise": random.random()})
        await each.telemetry.connected()
        await until(lambda: bool(each.kept()))
        for number in range(5):
            await each.outbox.append("health", "x", {"number": number})
            await until(lambda number=number: ("health", 1, number + 1) in each.kept(), 2.0)  # type: ignore[misc]
        left = each.outbox.held()["sample"].rows
        assert left > 2000


async def test_a_months_backlog_drains_whole_and_starves_no_live_health(tmp_path: Path) -> None:
    """Thirty days without a hub: health by the hour, a sample every five minutes; a million rows are a benchmark's."""
    clock = SetClock(1_800_000_000.0)
    async with ends(tmp_path, clock=clock, limits=replace(QUICK, shortest_wait_s=60.0)) as each:
        for hour in range(30 * 24):
            await each.outbox.append("health", "x", {"hour": hour})
            for minute in range(0, 60, 5):
                await each.outbox.append("sample", "x", {"hour": hour, "minute": minute})
            clock.pass_(3600.0)
        each.wire.held = []
        await each.telemetry.connected()
        await until(lambda: len(each.wire.seen) >= 1 + QUICK.history_window)
        first = each.batches()[0]
        assert (first.stream, first.first) == ("health", 720), "the newest health goes first"
        await each.outbox.append("health", "x", {"hour": 720})
        await until(lambda: any(batch.stream == "health" and batch.last == 721 for batch in each.batches()))
        assert each.kept() == {}, "and passes a history of which nothing was acknowledged yet"
        assert each.outbox.held()["sample"].rows == 8640, "nothing leaves the box before the hub has it"
        each.wire.release()
        await until(lambda: is_empty(each.outbox))
        kept = each.kept()
        assert len(kept) == 721 + 8640
        assert [kept["health", each.outbox.boot, number]["hour"] for number in range(1, 722)] == list(range(721))
        assert each.outbox.lost == 0


async def test_a_batch_is_as_large_as_may_be_and_no_larger(tmp_path: Path) -> None:
    async with ends(tmp_path) as each:
        for _ in range(30):
            await each.outbox.append("metric", "x", {"noise": random.randbytes(3500).hex()})
        for _ in range(2 * MOST_ROWS):
            await each.outbox.append("sample", "x", {})
        for _ in range(80):
            await each.outbox.append("health", "x", {"pad": "x" * 16_000})
        await each.telemetry.connected()
        await until(lambda: is_empty(each.outbox))
        assert max(len(message.payload) for message in each.wire.seen) <= LARGEST_BATCH_BYTES
        assert max(len(batch.rows) for batch in each.batches()) == MOST_ROWS
        assert each.store.tallies()[0].refused == 0
        assert len(each.kept()) == 30 + 2 * MOST_ROWS + 80


async def test_a_restarted_device_sends_what_the_boot_before_left_in_its_order(tmp_path: Path) -> None:
    for wall in (1_800_000_000.0, 0.0, 2_200_000_000.0, 1_700_000_000.0):
        outbox = Outbox(tmp_path / "telemetry.db", SetClock(wall))
        await outbox.append("health", "x", {"wall": wall})
        await outbox.append("health", "x", {"wall": wall})
        await outbox.close()
    async with ends(tmp_path) as each:
        await each.telemetry.connected()
        await until(lambda: is_empty(each.outbox))
        latest = each.store.latest_health()["box"]
        assert latest.body == {"wall": 1_700_000_000.0}
        boots = sorted({boot for _, boot, _ in each.kept()})
        assert len(boots) == 4
        assert [batch.boot for batch in each.batches()[1:]] == boots


async def test_acknowledgements_that_make_no_sense_change_nothing(tmp_path: Path) -> None:
    told: list[int] = []
    outbox = Outbox(tmp_path / "telemetry.db", SystemClock())
    link: Any = None
    telemetry = Telemetry(outbox, link, "box", SystemClock(), welcome=always, job_acknowledged=told.append)
    assert telemetry.kinds == {"ack"}
    await outbox.append("job", "x", {})

    async def say(payload: bytes) -> None:
        await telemetry.handle("ack", Message(down("box", "ack"), payload, qos=0))

    for wrong in (b"", b"\xff", b"[]", b"{}", b'{"stream":"x","boot":1,"up_to":1}', b"[" * 100_000):
        await say(wrong)
    for ack in (
        TelemetryAck("job", outbox.boot, 1, 0),
        TelemetryAck("job", outbox.boot, 1, 5),
        TelemetryAck("job", outbox.boot + 1, 1, 1),
        TelemetryAck("job", 0, 7),
    ):
        await say(msgspec.json.encode(ack))
    assert told == [7]
    assert not is_empty(outbox)
    await say(msgspec.json.encode(TelemetryAck("job", outbox.boot, 1, 1)))
    assert is_empty(outbox)
    await outbox.close()
    await Telemetry(outbox, link, "box", SystemClock(), welcome=always).handle(
        "ack", Message("x", msgspec.json.encode(TelemetryAck("job", 0, 7)))
    )
