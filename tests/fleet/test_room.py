"""The whole agent in this process, against a real broker and a small hub with a signed repository."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from appliance.core.clock import SystemClock
from appliance.core.errors import ConflictError, NotFoundError, UnreadableDatabaseError
from appliance.core.fleet import Command, Desired, HubState, down
from appliance.core.messaging import Message
from appliance.core.settings import load_settings
from appliance.core.types import Health
from appliance.fleet.command_ledger import CommandLedger
from appliance.fleet.diagnostics import unpack
from appliance.fleet.means import FleetMeans
from appliance.fleet.overlay import with_hub_settings
from appliance.fleet.recovery import MarkFile, open_or_rescue
from appliance.fleet.room import Fleet, open_fleet
from appliance.observe.metrics import Metrics
from appliance.registry.versions import open_registry
from appliance.store.database import Database
from tests.fleet.broker import Broker, Peer
from tests.fleet.links import until
from tests.fleet.small_hub import SmallHub

pytestmark = pytest.mark.anyio


class Memory:
    """Models in memory, without any."""

    def __init__(self) -> None:
        self.acted: list[str] = []
        self.hold: asyncio.Event | None = None

    def names(self) -> Collection[str]:
        return frozenset(each.removeprefix("load ") for each in self.acted if each.startswith("load "))

    async def load(self, name: str) -> None:
        if name == "absent":
            raise NotFoundError("There is no model absent.")
        if self.hold is not None:
            await self.hold.wait()
        self.acted.append(f"load {name}")

    async def unload(self, name: str) -> None:
        if name == "busy":
            raise ConflictError("busy is in use.")
        self.acted.append(f"unload {name}")


class Box:
    """A box whose serving is nothing but a health and a memory."""

    def __init__(self, data: Path, **flags: Any) -> None:
        settings, effective = load_settings(
            flags={"data_dir": data, "fleet_will_delay_s": "0", **flags}, environment={}
        )
        self.settings, self.effective = with_hub_settings(settings, effective)
        self.memory = Memory()
        self.restarts = 0
        self.metrics = Metrics()

    def health(self) -> Health:
        return Health(ready=False, reason="Loading chat:1.")

    def restart(self) -> None:
        self.restarts += 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Fleet]:
        database = Database(self.settings.database_path)
        means = FleetMeans(
            open_registry(self.settings, database),
            self.memory.names,
            self.memory,
            None,
            self,
            list,
            self.metrics,
            self.restart,
        )
        async with open_fleet(self.settings, self.effective, SystemClock(), means) as fleet:
            task = asyncio.get_running_loop().create_task(fleet.run())
            yield fleet
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        database.close()


@pytest.fixture
async def hub(broker: Broker, tmp_path: Path) -> AsyncIterator[SmallHub]:
    async with SmallHub(broker, tmp_path / "hub", "box") as hub:
        yield hub


@pytest.fixture
def data(hub: SmallHub, tmp_path: Path) -> Path:
    hub.enrol(tmp_path / "data")
    return tmp_path / "data"


async def test_a_box_is_born_reports_answers_and_says_goodbye(hub: SmallHub, data: Path) -> None:
    async with Box(data).running() as fleet:
        await hub.until(lambda: hub.states and hub.reports)
        assert [(each.epoch, each.status) for each in hub.states] == [(1, "online")]
        assert hub.reports[0].facts["hardware"]
        ping = await hub.command("ping")
        assert ping.ok
        assert (ping.result["ready"], ping.result["reason"]) == (False, "Loading chat:1.")
        await fleet.say_goodbye()
        await hub.until(lambda: hub.states[-1].status == "stopping")
    async with Box(data).running():
        await hub.until(lambda: hub.states[-1].status == "online")
    assert [(each.epoch, each.status) for each in hub.states[:3]] == [(1, "online"), (1, "stopping"), (2, "online")]


async def test_a_signed_wish_is_applied_and_one_by_a_stranger_is_not(hub: SmallHub, data: Path) -> None:
    box = Box(data)
    async with box.running():
        await hub.desire(Desired("box", 4, {"queue_size": 7, "host": "0.0.0.0"}))
        await hub.until(lambda: hub.reports and hub.reports[-1].desired_version == 4)
        assert hub.reports[-1].pending == ["queue_size"]
        assert hub.reports[-1].refused == {"host": "it is set on the box itself only"}
        await hub.desire(Desired("other", 5, {"queue_size": 1}))
        await hub.desire(Desired("box", 3, {"queue_size": 1}))
        await hub.send(Message(down("box", "des"), msgspec.json.encode(Desired("box", 9, {"queue_size": 1}))))
        await hub.command("twin")
        n = len(hub.reports)
        await hub.command("twin")
        await hub.until(lambda: len(hub.reports) > n)
        assert hub.reports[-1].desired_version == 4
    after = Box(data)
    assert after.settings.queue_size == 7
    assert {each.name: each.origin for each in after.effective}["queue_size"] == "fleet"
    assert Box(data, queue_size="5").settings.queue_size == 5, "a technician's flag wins"
    assert Box(data, fleet="off").settings.queue_size == 64, "a box that wants no hub is its own"


async def test_commands_act_once_however_often_they_come(hub: SmallHub, data: Path) -> None:
    box = Box(data)
    async with box.running():
        await hub.until(lambda: hub.states)
        first = await hub.command("load", id="load-1", model="chat")
        again = await hub.command("load", id="load-1", model="chat")
        other = await hub.command("unload", id="load-1", model="chat")
        assert first == again == other
    async with Box(data).running():
        assert await hub.command("load", id="load-1", model="chat") == first, "also after a restart"
    assert box.memory.acted == ["load chat"]


async def test_what_goes_wrong_in_a_command_is_its_answer(hub: SmallHub, data: Path) -> None:
    box = Box(data)
    async with box.running():
        await hub.until(lambda: hub.states)
        answers = {
            "unknown_command": await hub.command("format_disk"),
            "expired": await hub.command("ping", life_s=-1),
            "expires_too_late": await hub.command("ping", life_s=1e6),
            "not_found": await hub.command("load", model="absent"),
            "conflict": await hub.command("unload", model="busy"),
            "bad_arguments": await hub.command("load", modell="chat"),
            "not_supervised": await hub.command("restart"),
        }
        assert {code: (each.ok, each.code) for code, each in answers.items()} == {
            code: (False, code) for code in answers
        }
        assert "firmware_scripts/install" in answers["not_supervised"].detail
        kept = Command("kept", "load", {"model": "chat"}, 4e9)
        await hub.send(Message(down("box", "cmd"), msgspec.json.encode(kept), retain=True))
        for payload in (b"", b"null", b"[" * 10_000, b"x" * 100_000):
            await hub.send(Message(down("box", "cmd"), payload))
        assert (await hub.command("ping")).ok, "it is still there"
    assert box.memory.acted == []
    assert box.restarts == 0


async def test_a_command_that_the_broker_kept_is_never_carried_out(hub: SmallHub, data: Path) -> None:
    kept = Command("kept", "load", {"model": "chat"}, time.time() + 60)
    await hub.send(Message(down("box", "cmd"), msgspec.json.encode(kept), retain=True, correlation=b"k"))
    box = Box(data)
    async with box.running():
        await hub.until(lambda: b"k" in dict(hub.results))
    assert dict(hub.results)[b"k"].code == "retained"
    assert box.memory.acted == []


async def test_a_ping_does_not_wait_for_a_model_that_is_being_loaded(hub: SmallHub, data: Path) -> None:
    box = Box(data)
    box.memory.hold = asyncio.Event()
    async with box.running():
        await hub.until(lambda: hub.states)
        loading = await hub.ask("load", model="chat")
        assert (await hub.command("ping")).ok
        assert loading not in dict(hub.results)
        box.memory.hold.set()
        await hub.until(lambda: loading in dict(hub.results))


async def test_the_diagnostics_tell_settings_and_log_but_no_secret(
    hub: SmallHub, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with Box(data, mcp_servers="https://user:hunter2@example.org/mcp", queue_size="9").running():
        await hub.until(lambda: hub.states)
        done = await hub.command("diagnostics")
        tail = await hub.command("log_tail", lines=5)
    bundle = unpack(done.result)
    assert bundle["settings"]["queue_size"] == {"value": 9, "origin": "flag --queue-size"}
    assert bundle["settings"]["mcp_servers"]["value"] == "(set)"
    assert "hunter2" not in str(bundle)
    assert bundle["health"] == {"ready": False, "reason": "Loading chat:1."}
    assert bundle["versions"]["paho-mqtt"]
    assert any("connected to the fleet's broker" in each["message"] for each in bundle["log"])
    assert 1 <= len(tail.result["lines"]) <= 5
    assert done.result["lines_left_out"] == 0


async def test_a_restart_is_answered_before_it_happens_and_is_not_repeated(
    hub: SmallHub, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVOCATION_ID", "1")
    box = Box(data)
    async with box.running():
        await hub.until(lambda: hub.states)
        assert (await hub.command("restart", id="r")).result == {"restarting": True}
        await until(lambda: box.restarts == 1)
        assert (await hub.command("restart", id="r")).result == {"restarting": True}
        assert (await hub.command("ping")).ok
    assert box.restarts == 1


async def test_a_box_that_is_enrolled_later_connects_without_a_restart(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.fleet.room.LOOK_S", 0.02)
    data = tmp_path / "later"
    async with Box(data, fleet="on").running():
        await asyncio.sleep(0.1)
        assert not (data / "fleet.db").exists(), "a box without a hub has nothing of it"
        hub.enrol(data)
        await hub.until(lambda: hub.states)


async def test_a_broker_that_was_away_is_found_again_in_a_newer_session(hub: SmallHub, data: Path) -> None:
    async with Box(data).running():
        await hub.until(lambda: hub.states)
        hub.broker.restart(memory=False)
        await hub.until(lambda: hub.states[-1].epoch >= 2 and hub.states[-1].status == "online")
        assert (await hub.command("ping")).ok


async def test_a_broken_identity_or_database_is_a_log_line_and_nothing_else(
    hub: SmallHub, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "fleet.db").mkdir()
    box = Box(data)
    async with box.running() as fleet:
        await until(lambda: "begins anew in 60 s" in caplog.text)
        await fleet.say_goodbye()
    assert hub.states == []
    assert box.settings.queue_size == 64


@pytest.mark.parametrize("content", [b"no database" * 1000, b"", None], ids=["rotten", "empty", "gone"])
async def test_a_box_whose_record_is_damaged_comes_back_as_itself_and_is_taken_for_no_clone(
    hub: SmallHub, data: Path, content: bytes | None
) -> None:
    async with Box(data).running():
        await hub.until(lambda: hub.states)
        hub.broker.restart(memory=False)
        await hub.until(lambda: hub.states[-1].epoch >= 2 and hub.states[-1].status == "online")
    before = hub.states[-1]
    for suffix in ("-wal", "-shm", ""):
        (data / f"fleet.db{suffix}").unlink(missing_ok=True)
    if content is not None:
        (data / "fleet.db").write_bytes(content)
    async with Box(data).running():
        await hub.until(lambda: hub.states[-1].epoch > before.epoch and hub.states[-1].status == "online")
        assert hub.states[-1].instance == before.instance
        assert (await hub.command("ping")).ok
    assert (data / "fleet.db.damaged").exists() == bool(content)


async def unreadable(*_: object) -> bool:
    raise UnreadableDatabaseError("The database is damaged.")  # SQLite says so once a page is not in its cache any more


async def test_a_record_that_rots_while_the_box_runs_is_mended_without_a_restart(
    hub: SmallHub, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rotten(path: Path, now: float) -> tuple[Database, MarkFile, str]:
        path.write_bytes(b"rot" * 10_000)
        return open_or_rescue(path, now)

    monkeypatch.setattr("appliance.fleet.room.AGAIN_S", 0.05)
    async with Box(data).running():
        await hub.until(lambda: hub.states and hub.reports)
        epoch = hub.states[-1].epoch
        with monkeypatch.context() as patched:
            patched.setattr("appliance.fleet.session.open_or_rescue", rotten)
            patched.setattr(CommandLedger, "accept", unreadable)
            await hub.ask("ping")
            await hub.until(lambda: hub.states[-1].epoch > epoch and hub.states[-1].status == "online")
        assert (await hub.command("ping")).ok
    assert (data / "fleet.db.damaged").exists()


async def test_a_second_box_with_the_same_identity_is_noticed_and_backed_off_from(
    hub: SmallHub, data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.messaging.connection.Reconnect.delay_s", lambda _self, _fraction, hold_off: hold_off)
    async with Box(data).running(), Peer(hub.broker.options("box")) as clone:  # which pushes back at once, for ever
        await until(lambda: "another box uses the identity of box" in caplog.text)
        await clone.link.until_connected()
        connects = clone.link.figures.connects
        assert (hub.states[-1].epoch, connects) >= (3, 3)
        await asyncio.sleep(0.5)
        assert clone.link.figures.connects == connects, "one of the two gives way"


async def test_a_hub_that_is_down_and_comes_back_is_asked_in_this_boxs_own_time(hub: SmallHub, data: Path) -> None:
    await hub.say(HubState("down", 0.0))
    async with Box(data).running():
        await hub.until(lambda: hub.states)
        assert (await hub.command("ping")).ok
        assert "time" not in hub.questions
        await hub.say(HubState("up", 0.0))
        await hub.until(lambda: "time" in hub.questions)


async def test_a_broker_that_is_killed_leaves_the_agent_running(hub: SmallHub, data: Path) -> None:
    box = Box(data)
    async with box.running() as fleet:
        await hub.until(lambda: hub.states)
        hub.broker.stop(signal.SIGKILL)
        await until(lambda: b"appliance_fleet_connected 0.0" in box.metrics.render())
        async with asyncio.timeout(5):
            await fleet.say_goodbye()


async def test_telemetry_goes_to_the_hub_at_the_rate_that_it_wants(hub: SmallHub, data: Path) -> None:
    async with Box(data).running():
        await hub.until(lambda: hub.batches.get("health"))
        await hub.desire(Desired("box", 1, telemetry={"metric": 1, "gossip": 1}))
        await hub.until(lambda: len(hub.batches.get("metric", [])) > 1 and hub.reports[-1].desired_version == 1)
        assert hub.reports[-1].refused.keys() == {"telemetry.gossip"}


async def test_a_box_that_tells_nothing_has_no_telemetry(hub: SmallHub, data: Path) -> None:
    async with Box(data, fleet_telemetry="off").running():
        await hub.desire(Desired("box", 1, {"fleet_telemetry": "on"}, telemetry={"metric": 1}))
        await hub.until(lambda: hub.reports and hub.reports[-1].desired_version == 1)
        assert hub.reports[-1].refused.keys() == {"fleet_telemetry", "telemetry.metric"}
    assert hub.batches == {}
    assert not (data / "telemetry.db").exists()
