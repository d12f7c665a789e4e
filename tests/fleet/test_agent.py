"""The agent's session and dispatch, whatever its parts, the hub and the network do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from appliance.core.clock import SystemClock
from appliance.core.errors import InvalidRequestError, UnavailableError, UnreadableDatabaseError
from appliance.core.fleet import HUB_TOPIC, Answer, DeviceState, DownKind, HubState, down
from appliance.core.messaging import Message
from appliance.fleet.agent import FleetAgent
from appliance.fleet.asking import Questions
from appliance.fleet.clones import HOLD_OFF_S
from appliance.fleet.device_ledger import DeviceLedger
from appliance.fleet.hub_watch import HubWatch
from appliance.fleet.schema import open_fleet_database
from appliance.observe.metrics import Metrics
from appliance.store.database import Database
from tests.fleet.links import KeptLink

pytestmark = pytest.mark.anyio


class Part:
    """Keeps what it was handed; each step may be made to fail."""

    def __init__(self, *kinds: DownKind, fails: Exception | None = None) -> None:
        self.kinds = frozenset(kinds)
        self.handled: list[bytes] = []
        self.greeted = 0
        self.ran = 0
        self.fails = fails
        self.on_run: Callable[[], Awaitable[None]] | None = None

    async def handle(self, kind: DownKind, message: Message) -> None:
        self.handled.append(message.payload)
        if self.fails:
            raise self.fails

    async def connected(self) -> None:
        self.greeted += 1
        if self.fails:
            raise self.fails

    async def run(self) -> None:
        self.ran += 1
        if self.on_run is not None:
            await self.on_run()
        if self.fails:
            raise self.fails


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = open_fleet_database(tmp_path / "fleet.db")
    yield database
    database.close()


class Bench:
    """An agent with its surroundings."""

    def __init__(self, database: Database, *parts: Part) -> None:
        self.link = KeptLink()
        self.clock = SystemClock()
        self.hub = HubWatch(self.clock)
        self.metrics = Metrics()
        self.alarms: list[tuple[str, dict[str, Any]]] = []
        self.asking = Questions("box", self.link)
        self.ledger = DeviceLedger(database)
        self.agent = FleetAgent(
            "box",
            "0123",
            self.link,
            self.ledger,
            hub=self.hub,
            asking=self.asking,
            parts=[self.asking, *parts],
            clock=self.clock,
            metrics=self.metrics.fleet,
            alarm=self._alarm,
        )

    async def _alarm(self, kind: str, body: dict[str, Any]) -> None:
        self.alarms.append((kind, body))

    def states(self) -> list[DeviceState]:
        return [
            msgspec.json.decode(each.payload, type=DeviceState)
            for each in self.link.sent
            if each.topic == "ea/1/up/box/state"
        ]

    async def open(self) -> DeviceState:
        will = await self.agent.opening()
        await self.agent.opened()
        return msgspec.json.decode(will.payload, type=DeviceState)


async def test_each_session_has_a_higher_epoch_than_any_before_it_and_its_will_carries_it(database: Database) -> None:
    bench = Bench(database)
    first = await bench.open()
    again = Bench(database)  # as after a restart
    second = await again.open()
    assert (first.epoch, first.status, second.epoch, second.status) == (1, "lost", 2, "lost")
    assert [(each.epoch, each.status) for each in bench.states() + again.states()] == [(1, "online"), (2, "online")]
    assert first.instance == second.instance == "0123"
    assert all(each.retain and each.qos == 1 for each in bench.link.sent)


async def test_the_epoch_is_on_the_disk_before_anybody_connects_with_it(database: Database) -> None:
    bench = Bench(database)
    await bench.agent.opening()
    assert bench.ledger.epoch == 1
    assert bench.link.sent == []


async def test_an_orderly_end_says_stopping_in_the_same_epoch(database: Database) -> None:
    bench = Bench(database)
    await bench.open()
    await bench.agent.say_goodbye()
    assert [(each.epoch, each.status) for each in bench.states()] == [(1, "online"), (1, "stopping")]


async def test_a_message_goes_to_the_part_that_reads_its_topic(database: Database) -> None:
    twin, commands = Part("des"), Part("cmd")
    bench = Bench(database, twin, commands)
    await bench.open()
    await bench.agent.receive(Message(down("box", "des"), b"desired"))
    await bench.agent.receive(Message(down("box", "cmd"), b"command"))
    assert (twin.handled, commands.handled) == ([b"desired"], [b"command"])


@pytest.mark.parametrize("topic", ["ea/1/dn/other/cmd", "ea/1/dn/box/cmd/more", "ea/1/dn/box/", "", "cmd"])
async def test_a_message_on_another_topic_reaches_nobody(database: Database, topic: str) -> None:
    part = Part("cmd")
    bench = Bench(database, part)
    await bench.open()
    await bench.agent.receive(Message(topic, b""))
    assert part.handled == []


async def test_two_readers_of_one_topic_are_a_mistake_that_shows_at_once(database: Database) -> None:
    with pytest.raises(ValueError, match="des"):
        Bench(database, Part("des"), Part("cmd", "des"))


@pytest.mark.parametrize("error", [InvalidRequestError("bad"), RuntimeError("worse"), RecursionError("deep")])
async def test_a_part_that_raises_takes_nobody_down(
    database: Database, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    broken, sound = Part("cmd", fails=error), Part("des")
    bench = Bench(database, broken, sound)
    await bench.open()
    assert (broken.greeted, sound.greeted) == (1, 1)
    with caplog.at_level(logging.WARNING, "appliance.fleet"):
        await bench.agent.receive(Message(down("box", "cmd"), b""))
    await bench.agent.receive(Message(down("box", "des"), b"still here"))
    assert "Part of the fleet's agent failed" in caplog.text
    assert sound.handled == [b"still here"]
    assert b"appliance_fleet_part_failures_total 2.0" in bench.metrics.render()


async def test_a_part_whose_work_ends_in_an_error_is_started_anew(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.fleet.agent.random.uniform", lambda _low, _high: 0)
    part, again = Part("cmd", fails=RuntimeError("once")), asyncio.Event()

    async def on_run() -> None:
        if part.ran == 3:
            part.fails = None
            again.set()
            await asyncio.Event().wait()

    part.on_run = on_run
    bench = Bench(database, part)
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(bench.agent.run())
        await again.wait()
        running.cancel()
    assert part.ran == 3


async def test_a_part_that_finds_the_record_damaged_ends_the_session_for_the_next_to_mend_it(
    database: Database,
) -> None:
    bench = Bench(database, Part("cmd", fails=UnreadableDatabaseError("The database is damaged.")))

    async def session() -> None:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(bench.agent.run())
            await bench.agent.receive(Message("ea/1/dn/box/cmd", b""))

    with pytest.raises(ExceptionGroup) as ended:
        await session()
    assert ended.group_contains(UnreadableDatabaseError)


async def test_a_connection_that_is_gone_while_greeting_is_told_to_whoever_opened_it(database: Database) -> None:
    bench = Bench(database)
    bench.link.connected = False
    with pytest.raises(UnavailableError):
        await bench.open()
    await bench.agent.say_goodbye()
    assert bench.link.sent == []


async def test_a_cloned_identity_is_backed_off_from_and_an_alarm_is_raised(database: Database) -> None:
    bench = Bench(database)
    waits = []
    for _ in range(4):
        await bench.open()
        waits.append(await bench.agent.closed(taken_over=True))
    assert waits == [0, 0, HOLD_OFF_S, HOLD_OFF_S]
    assert bench.alarms == [("cloned_identity", {"epoch": 3, "instance": "0123"})], "once, and not with each session"


async def test_a_connection_that_merely_drops_is_no_clone(database: Database) -> None:
    bench = Bench(database)
    for _ in range(10):
        await bench.open()
        bench.agent._since -= 60.0
        assert await bench.agent.closed(taken_over=False) == 0
    assert bench.alarms == []
    assert b"appliance_fleet_connected 0.0" in bench.metrics.render()
    assert b"appliance_fleet_connects_total 10.0" in bench.metrics.render()


def hub_says(state: HubState, *, retain: bool = False) -> Message:
    return Message(HUB_TOPIC, msgspec.json.encode(state), retain=retain)


async def test_the_hub_is_asked_for_its_time_in_each_session(database: Database) -> None:
    bench = Bench(database)
    await bench.open()
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(bench.agent.run())
        await bench.link.wait_for(2)
        asked = bench.link.sent[1]
        answer = msgspec.msgpack.encode(Answer(True, now=4_000_000_000.0))
        await bench.agent.receive(Message(down("box", "res"), answer, correlation=asked.correlation))
        for _ in range(10):
            await asyncio.sleep(0)
        running.cancel()
    assert bench.hub.unix() >= 4_000_000_000.0


async def test_a_hub_that_is_down_is_asked_nothing_until_it_is_up(database: Database) -> None:
    bench = Bench(database)
    bench.hub.hear(hub_says(HubState("down", 0.0), retain=True))
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(bench.hub.welcome())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        await bench.agent.receive(hub_says(HubState("up", 0.0, hold_off_s=0.02)))
        await waiting


async def test_a_hub_that_wants_an_endless_pause_gets_an_hour_at_most(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(database)
    monkeypatch.setattr("appliance.fleet.hub_watch.random.random", lambda: 1.0)
    bench.hub.hear(hub_says(HubState("up", 1.0, hold_off_s=1e300)))
    assert 3599 < bench.hub._wait_s() <= 3600
    monkeypatch.setattr("appliance.fleet.hub_watch.random.random", lambda: 0.0)
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(bench.hub.welcome())
        await asyncio.sleep(0)
        bench.hub.hear(hub_says(HubState("up", 1.0, hold_off_s=1e300)))
        await waiting


async def test_a_pause_that_the_broker_kept_is_over_long_ago(database: Database) -> None:
    bench = Bench(database)
    bench.hub.hear(hub_says(HubState("up", 1.0, hold_off_s=1000), retain=True))
    assert bench.hub._wait_s() <= 0


@pytest.mark.parametrize("payload", [b"", b"null", b"[" * 100_000, b'{"status":"sideways","at":0}'])
async def test_a_hub_state_that_is_none_changes_nothing(database: Database, payload: bytes) -> None:
    bench = Bench(database)
    await bench.agent.receive(Message(HUB_TOPIC, payload))
    await bench.hub.welcome()
    assert abs(bench.hub.unix() - bench.clock.unix()) < 5


async def test_the_time_of_a_kept_message_is_not_believed(database: Database) -> None:
    bench = Bench(database)
    bench.hub.hear(hub_says(HubState("up", 4_000_000_000.0), retain=True))
    assert bench.hub.unix() < 4_000_000_000.0
    bench.hub.hear(hub_says(HubState("up", 4_000_000_000.0)))
    assert bench.hub.unix() >= 4_000_000_000.0


async def test_after_a_lost_connection_the_hub_counts_as_not_known(database: Database) -> None:
    bench = Bench(database)
    bench.hub.hear(hub_says(HubState("down", 0.0)))
    await bench.agent.closed(taken_over=False)
    async with asyncio.timeout(1):
        await bench.hub.welcome()
