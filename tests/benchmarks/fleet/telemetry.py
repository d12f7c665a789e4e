"""A month's backlog of telemetry over a real broker to a real hub, with live health on the way.

    python -m tests.benchmarks.fleet.telemetry --rows 1000000

Device, broker and hub are processes of their own on one machine. The outbox is filled first, once under the usual cap,
to see that the cap is held, and once under a cap that holds all. Batches of 100 rows of 500 devices are handed to an
ingest without a broker. Then the box connects, and a row of health is appended twice a second while the backlog drains;
its latency is from before `append` to the hub's acknowledgement of the commit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil

from appliance.core.clock import SystemClock
from appliance.core.fleet import TelemetryAck, TelemetryBatch, TelemetryRow, up
from appliance.core.messaging import Message, Subscription
from appliance.fleet.pace import USUAL, PaceLimits
from appliance.fleet.telemetry import Telemetry
from appliance.hub.ingest import TelemetryIngest
from appliance.hub.schema import MIGRATIONS
from appliance.hub.telemetry_store import SqliteTelemetry
from appliance.messaging.compression import compress
from appliance.messaging.connection import Connection, ConnectionOptions, TlsFiles
from appliance.security.certificates import HUB_NAME
from appliance.store.database import Database
from appliance.store.outbox import Limits, Outbox
from tests.fleet.broker import Broker
from tests.fleet.telemetry_ends import always, deliver

HEALTH_S = 0.5
STALL_S = 300.0
DEVICES = 500
FILL = 500


def main() -> None:
    """Measure and print, as a table and as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of backlog (%(default)s)")
    parser.add_argument("--cap-mib", type=int, default=64, help="cap of the outbox in the first part (%(default)s)")
    parser.add_argument("--rate-kib", type=int, default=0, help="history a second; 0 is as fast as it goes")
    parser.add_argument("--hub", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.hub:
        asyncio.run(_hub(*given.hub))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(_measure(Path(folder), given))
    for name, value in figures.items():
        print(f"{name:<40} {value:,.4g}" if isinstance(value, float) else f"{name:<40} {value:,}")
    print(json.dumps(figures))


def _body(number: int) -> dict[str, Any]:
    """Return what a row of resources holds, with figures that change as measured ones do."""
    return {
        "cpu": (number * 7919 % 1000) / 1000,
        "load": (number * 104_729 % 400) / 100,
        "resident": 700_000_000 + number * 4099 % 50_000_000,
        "memory": {"available": 2_000_000_000 + number * 8191 % 900_000_000},
        "temperatures": {"cpu-thermal": 40 + (number * 31 % 300) / 10, "gpu-thermal": 40 + (number * 17 % 300) / 10},
        "watts": {"VDD_IN": 4 + (number * 13 % 900) / 100},
    }


async def _measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {"rows": given.rows}
    figures.update(await _fill_under_a_cap(folder / "capped" / "telemetry.db", given))
    path = folder / "backlog" / "telemetry.db"
    outbox = Outbox(path, SystemClock(), Limits(bytes=2**40, age_s=1e12))
    for number in range(given.rows):
        await outbox.append("sample", "resources", _body(number))
    await outbox.flush()
    figures["backlog: file, MiB"] = path.stat().st_size / 2**20
    figures.update(await _ingest(folder / "ingest.db"))
    (folder / "broker").mkdir()
    broker = Broker(folder / "broker")
    broker.start()
    try:
        figures.update(await _drain(folder, broker, outbox, given))
    finally:
        broker.stop()
        await outbox.close()
    return figures


async def _fill_under_a_cap(path: Path, given: argparse.Namespace) -> dict[str, Any]:
    cap = given.cap_mib * 2**20
    outbox = Outbox(path, SystemClock(), Limits(bytes=cap))
    most = most_file = 0
    began, cpu = time.monotonic(), time.process_time()
    for number in range(given.rows):
        await outbox.append("sample", "resources", _body(number))
        if number % FILL == 0:
            await outbox.flush()
            most = max(most, sum(each.bytes for each in outbox.held().values()))
            most_file = max(most_file, path.stat().st_size)  # noqa: ASYNC240
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    await outbox.flush()
    kept, lost = outbox.held()["sample"].rows, outbox.lost
    await outbox.close()
    return {
        "cap: bytes": cap,
        "cap: most bytes held": most,
        "cap: most bytes of the file": most_file,
        "cap: rows kept": kept - bool(lost),
        "cap: rows counted by the gap": lost,
        "cap: appended rows/s": given.rows / seconds,
        "cap: appended rows per CPU second": given.rows / cpu,
    }


async def _ingest(path: Path) -> dict[str, Any]:
    """Hand batches of many devices to the ingest, without a broker."""

    class Nowhere:
        connected = True

        async def publish(self, message: Message) -> None:
            pass

    batches = [_batch(device, first) for first in (1, 101) for device in range(DEVICES)]
    with closing(Database(path, migrations=MIGRATIONS)) as database:
        ingest = TelemetryIngest(SqliteTelemetry(database), Nowhere(), SystemClock())
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(ingest.run())
            began, cpu = time.monotonic(), time.process_time()
            await asyncio.gather(*(deliver(ingest, each) for each in batches))
            seconds, cpu = time.monotonic() - began, time.process_time() - cpu
            running.cancel()
    rows = 100 * len(batches)
    return {"ingest: rows/s": rows / seconds, "ingest: rows per CPU second": rows / cpu}


def _batch(device: int, first: int) -> Message:
    rows = [TelemetryRow(n, 0.0, "resources", _body(n)) for n in range(first, first + 100)]
    batch = TelemetryBatch("metric", 1, first, first + 99, rows)
    return Message(up(f"box-{device}", "tm", "metric"), compress(msgspec.json.encode(batch)))


@dataclass
class _Live:
    """Rows of health under way, and how long each took."""

    sent: dict[int, float] = field(default_factory=dict)
    took: list[float] = field(default_factory=list)

    def acknowledged(self, ack: TelemetryAck) -> None:
        if ack.stream == "health":
            for number in [each for each in self.sent if each <= ack.up_to]:
                self.took.append(time.monotonic() - self.sent.pop(number))


async def _drain(folder: Path, broker: Broker, outbox: Outbox, given: argparse.Namespace) -> dict[str, Any]:
    tls = broker.hub()
    arguments = [folder / "hub.db", broker.port, tls.authority, tls.certificate, tls.key]
    command = [sys.executable, "-m", "tests.benchmarks.fleet.telemetry", "--hub", *map(str, arguments)]
    hub = _start(command)
    try:
        assert hub.stdout is not None
        await asyncio.to_thread(hub.stdout.readline)
        seen = psutil.Process(hub.pid)
        before, hub_cpu = seen.memory_info().rss, sum(seen.cpu_times()[:2])
        live, limits = _Live(), PaceLimits(history_rate=given.rate_kib * 1024.0 or 1e9)
        async with asyncio.TaskGroup() as tasks:
            link, telemetry = _device(broker, outbox, limits, live)
            running = [tasks.create_task(telemetry.run()), tasks.create_task(link.run())]
            running.append(tasks.create_task(_tell_health(outbox, live)))
            began, cpu, bytes_before = time.monotonic(), time.process_time(), telemetry.published
            most_memory = before
            left = given.rows
            progress = began
            while left:
                await asyncio.sleep(0.2)
                most_memory = max(most_memory, seen.memory_info().rss)
                now_left = outbox.held()["sample"].rows
                progress = time.monotonic() if now_left != left else progress
                left = now_left
                assert time.monotonic() - progress < STALL_S, f"{left} rows do not drain"
            seconds, cpu = time.monotonic() - began, time.process_time() - cpu
            hub_cpu = sum(seen.cpu_times()[:2]) - hub_cpu
            for each in running:
                each.cancel()
    finally:
        hub.kill()
        hub.wait()
    with closing(Database(folder / "hub.db", migrations=MIGRATIONS)) as database:
        kept = database.read(_count)
    took = sorted(live.took)
    return {
        "drain: rows/s": given.rows / seconds,
        "drain: rows per CPU second of the box": given.rows / cpu,
        "drain: rows per CPU second of the hub": given.rows / hub_cpu,
        "drain: batches": telemetry.published - bytes_before,
        "drain: MiB sent": _Sent.size / 2**20,
        "drain: minutes at the usual pace": _Sent.size / USUAL.history_rate / 60,
        "drain: rows the hub has": kept,
        "live health: rows": len(took),
        "live health: p50 s": statistics.median(took),
        "live health: p99 s": took[max(0, round(0.99 * len(took)) - 1)],
        "live health: worst s": took[-1],
        "hub: memory before, MiB": before / 2**20,
        "hub: most memory, MiB": most_memory / 2**20,
    }


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ)


def _count(connection: Any) -> int:
    select = "SELECT count(*) FROM telemetry_rows WHERE kind = 'resources'"
    return int(connection.execute(select).fetchone()[0])


class _Sent:
    """Bytes of batches."""

    size = 0


class _Counting:
    """A link that counts what goes over it."""

    def __init__(self, link: Connection) -> None:
        self._link = link

    @property
    def connected(self) -> bool:
        return self._link.connected

    async def publish(self, message: Message) -> None:
        _Sent.size += len(message.payload)
        await self._link.publish(message)


def _device(broker: Broker, outbox: Outbox, limits: PaceLimits, live: _Live) -> tuple[Connection, Telemetry]:
    parts: list[Telemetry] = []

    async def receive(message: Message) -> None:
        await parts[0].handle("ack", message)
        live.acknowledged(msgspec.json.decode(message.payload, type=TelemetryAck))

    async def connected() -> None:
        await parts[0].connected()

    link = Connection(
        broker.options("box"),
        receive,
        subscriptions=[Subscription("ea/1/dn/box/ack", 0)],
        on_connected=connected,
    )
    parts.append(Telemetry(outbox, _Counting(link), "box", SystemClock(), welcome=always, limits=limits))
    return link, parts[0]


async def _tell_health(outbox: Outbox, live: _Live) -> None:
    number = 0
    while True:
        number += 1
        live.sent[number] = time.monotonic()
        await outbox.append("health", "health", {"ready": True, "reason": ""})
        await asyncio.sleep(HEALTH_S)


async def _hub(database: str, port: str, authority: str, certificate: str, key: str) -> None:
    tls = TlsFiles(Path(authority), Path(certificate), Path(key))
    options = ConnectionOptions(host="localhost", port=int(port), client_id=HUB_NAME, tls=tls, receive_maximum=256)
    ingests: list[TelemetryIngest] = []

    async def receive(message: Message) -> None:
        await deliver(ingests[0], message)

    link = Connection(options, receive, subscriptions=[Subscription("ea/1/up/+/tm/#")], lanes=64)
    with closing(Database(Path(database), migrations=MIGRATIONS)) as opened:
        ingests.append(TelemetryIngest(SqliteTelemetry(opened), link, SystemClock()))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ingests[0].run())
            tasks.create_task(link.run())
            await link.until_connected()
            print("connected", flush=True)


if __name__ == "__main__":
    main()
