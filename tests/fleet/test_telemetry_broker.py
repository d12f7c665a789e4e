"""Telemetry over a real mosquitto, which is restarted, and to a hub that is killed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import pytest

from appliance.core.messaging import Message, Subscription
from appliance.fleet.telemetry import Telemetry
from appliance.hub.ingest import TelemetryIngest
from appliance.hub.schema import MIGRATIONS
from appliance.hub.telemetry_store import SqliteTelemetry
from appliance.messaging.connection import Connection
from appliance.security.certificates import HUB_NAME
from appliance.store.database import Database
from tests.fleet.broker import Broker
from tests.fleet.telemetry_ends import deliver, device, hub, is_empty, until

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
DEADLINE_S = 60.0


@asynccontextmanager
async def connection(connection: Connection) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(connection.run())
        yield
        task.cancel()


@asynccontextmanager
async def box(broker: Broker, folder: Path, name: str = "box") -> AsyncIterator[Telemetry]:
    part: list[Telemetry] = []

    async def receive(message: Message) -> None:
        await part[0].handle("ack", message)

    async def connected() -> None:
        await part[0].connected()

    link = Connection(
        broker.options(name),
        receive,
        subscriptions=[Subscription(f"ea/1/dn/{name}/ack", 0)],
        on_connected=connected,
        uniform=lambda: 0.05,
    )
    async with device(folder / f"{name}.db", link, name) as telemetry:
        part.append(telemetry)
        async with connection(link):
            yield telemetry


@asynccontextmanager
async def running_hub(broker: Broker, folder: Path) -> AsyncIterator[SqliteTelemetry]:
    ingests: list[TelemetryIngest] = []

    async def receive(message: Message) -> None:
        await deliver(ingests[0], message)

    link = Connection(
        broker.options(HUB_NAME),
        receive,
        subscriptions=[Subscription("ea/1/up/+/tm/#")],
        lanes=32,
        uniform=lambda: 0.05,
    )
    async with hub(folder / "hub.db", link) as (ingest, store):
        ingests.append(ingest)
        async with connection(link):
            async with asyncio.timeout(DEADLINE_S):
                await link.until_connected()
            yield store


def kept(store: SqliteTelemetry) -> list[tuple[str, str, int]]:
    return sorted((each.device, each.stream, each.sequence) for each in store.rows(limit=10**9)[0])


@pytest.mark.parametrize("memory", [True, False], ids=["with its memory", "without its memory"])
async def test_the_broker_is_restarted_and_nothing_is_lost_or_doubled(
    broker: Broker, tmp_path: Path, memory: bool
) -> None:
    async with running_hub(broker, tmp_path) as store, box(broker, tmp_path) as telemetry:
        outbox = telemetry._outbox
        for number in range(300):
            await outbox.append("metric", "x", {"number": number})
            if number in {100, 200}:
                await asyncio.to_thread(broker.restart, memory=memory)
        await until(lambda: is_empty(outbox), DEADLINE_S)
        assert kept(store) == [("box", "metric", number) for number in range(1, 301)]
        assert store.tallies()[0].lost == 0


HUB_THAT_IS_KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from appliance.core.clock import SystemClock
from appliance.core.messaging import Subscription
from appliance.hub.ingest import TelemetryIngest
from appliance.hub.ingest import TelemetryIngest
from appliance.hub.schema import MIGRATIONS
from appliance.hub.telemetry_store import SqliteTelemetry
from appliance.messaging.connection import Connection, ConnectionOptions, TlsFiles
from appliance.store.database import Database
from tests.fleet.telemetry_ends import deliver

database, port, authority, certificate, key, commits = sys.argv[1:]

class Killed(SqliteTelemetry):
    left = int(commits)
    async def keep(self, batches):
        await super().keep(batches)
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

async def main():
    tls = TlsFiles(Path(authority), Path(certificate), Path(key))
    options = ConnectionOptions(host="localhost", port=int(port), client_id="hub", tls=tls)
    async def receive(message):
        await deliver(ingest, message)
    link = Connection(options, receive, subscriptions=[Subscription("ea/1/up/+/tm/#")], lanes=32, uniform=lambda: 0.0)
    ingest = TelemetryIngest(Killed(Database(Path(database), migrations=MIGRATIONS)), link, SystemClock())
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ingest.run())
        tasks.create_task(link.run())

asyncio.run(main())
"""


def start_hub(broker: Broker, folder: Path, commits: int) -> subprocess.Popen[bytes]:
    tls = broker.hub()
    arguments = [folder / "hub.db", broker.port, tls.authority, tls.certificate, tls.key, commits]
    checkout = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", HUB_THAT_IS_KILLED, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        cwd=checkout,
    )


async def test_a_hub_that_is_killed_between_commit_and_acknowledgement_loses_and_doubles_nothing(
    broker: Broker, tmp_path: Path
) -> None:
    async with box(broker, tmp_path) as telemetry:
        outbox = telemetry._outbox
        for number in range(200):
            await outbox.append("metric", "x", {"number": number})
            await outbox.append("alarm", "x", {"number": number})
        kills = 0
        async with asyncio.timeout(DEADLINE_S):
            while not is_empty(outbox):
                process = start_hub(broker, tmp_path, commits=2 if kills < 3 else 10**9)
                try:
                    while not is_empty(outbox) and process.poll() is None:
                        await outbox.append("health", "x", {})
                        await asyncio.sleep(0.05)
                    kills += process.poll() is not None
                finally:
                    with suppress(ProcessLookupError):
                        process.kill()
                    await asyncio.to_thread(process.wait, 10)
        assert kills >= 3
    with closing(Database(tmp_path / "hub.db", migrations=MIGRATIONS)) as database:
        store = SqliteTelemetry(database)
        found = kept(store)
    for stream in ("metric", "alarm"):
        assert [each for each in found if each[1] == stream] == [("box", stream, n) for n in range(1, 201)]
    healths = [n for _, stream, n in found if stream == "health"]
    assert healths == list(range(1, len(healths) + 1))


async def test_two_devices_cannot_harm_each_other(broker: Broker, tmp_path: Path) -> None:
    async with running_hub(broker, tmp_path) as store:
        async with box(broker, tmp_path, "good") as good, box(broker, tmp_path, "odd") as odd:
            await until(lambda: good._link.connected and odd._link.connected, DEADLINE_S)
            for _ in range(20):
                await odd._link.publish(Message("ea/1/up/odd/tm/metric", b"noise", correlation=b"1.1.5"))
            for _ in range(50):
                await good._outbox.append("metric", "x", {})
            await odd._outbox.append("metric", "x", {})
            await until(lambda: is_empty(good._outbox) and len(kept(store)) >= 51, DEADLINE_S)
        assert len([each for each in kept(store) if each[0] == "good"]) == 50
        assert {each.device: each.refused for each in store.tallies()} == {"good": 0, "odd": 20}
