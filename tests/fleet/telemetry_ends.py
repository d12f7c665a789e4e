"""Both ends of telemetry: a device with its outbox, a hub with its store, and whatever is between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

from appliance.core.clock import Clock, SystemClock
from appliance.core.errors import UnavailableError
from appliance.core.fleet import ROOT
from appliance.core.messaging import Link, Message
from appliance.fleet.pace import PaceLimits
from appliance.fleet.telemetry import Telemetry
from appliance.hub.ingest import TelemetryIngest
from appliance.hub.schema import MIGRATIONS
from appliance.hub.telemetry_store import SqliteTelemetry
from appliance.store.database import Database
from appliance.store.outbox import Limits, Outbox
from tests.store.clocks import SetClock

DEADLINE_S = 60.0
QUICK = PaceLimits(history_rate=1e9, shortest_wait_s=0.2, longest_wait_s=5.0)


async def always() -> None:
    """Let a device speak to the hub at any time."""


@asynccontextmanager
async def device(
    path: Path,
    link: Link,
    name: str = "box",
    *,
    limits: PaceLimits = QUICK,
    clock: Clock | None = None,
    outbox_limits: Limits = Limits(),  # noqa: B008
    welcome: Callable[[], Awaitable[None]] = always,
) -> AsyncIterator[Telemetry]:
    """Run a device's outbox and sender; the caller tells it that it is connected."""
    outbox = Outbox(path, clock or SetClock(), outbox_limits)
    telemetry = Telemetry(outbox, link, name, SystemClock(), welcome=welcome, limits=limits)
    try:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(telemetry.run())
            yield telemetry
            task.cancel()
    finally:
        await outbox.close()


@asynccontextmanager
async def hub(path: Path, link: Link) -> AsyncIterator[tuple[TelemetryIngest, SqliteTelemetry]]:
    """Run a hub's ingest and store."""
    with closing(Database(path, migrations=MIGRATIONS)) as database:
        store = SqliteTelemetry(database)
        ingest = TelemetryIngest(store, link, SystemClock())
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(ingest.run())
            yield ingest, store
            task.cancel()


async def deliver(ingest: TelemetryIngest, message: Message) -> None:
    """Hand a message to the ingest as the hub's dispatch does."""
    root, _, branch = message.topic.partition("/up/")
    assert root == ROOT
    name, kind, rest = branch.split("/", 2)
    assert kind == "tm"
    await ingest.handle(name, "tm", rest, message)


class Wire:
    """Between one device and a hub: what each publishes goes to the other, as often and when a test says.

    Attributes:
        connected: Whether the device can publish.
        up: Called with each batch; returns how often it arrives, 0 being a loss after the broker confirmed it.
        down: The same for acknowledgements.
        held: Batches that wait for `release`, if that is not None.
        seen: Every message of the device.
    """

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.connected = True
        self.up: Callable[[Message], int] = lambda _: 1
        self.down: Callable[[Message], int] = lambda _: 1
        self.held: list[Message] | None = None
        self.seen: list[Message] = []
        self.telemetry: Telemetry | None = None
        self.ingest: TelemetryIngest | None = None
        self._tasks = tasks

    async def publish(self, message: Message) -> None:
        if not self.connected:
            raise UnavailableError("There is no connection.")
        if "/up/" in message.topic:
            self.seen.append(message)
            for _ in range(self.up(message)):
                if self.held is not None:
                    self.held.append(message)
                else:
                    self._arrive(message)
        else:
            for _ in range(self.down(message)):
                assert self.telemetry is not None
                await self.telemetry.handle("ack", message)

    def release(self) -> None:
        """Let what was held arrive, the last first."""
        held, self.held = self.held or [], None
        for message in reversed(held):
            self._arrive(message)

    def _arrive(self, message: Message) -> None:
        assert self.ingest is not None
        self._tasks.create_task(deliver(self.ingest, message))


async def until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110  (a state without an event)
            await asyncio.sleep(0.01)


def is_empty(outbox: Outbox) -> bool:
    """Return whether nothing waits in an outbox."""
    return not any(each.rows for each in outbox.held().values())
