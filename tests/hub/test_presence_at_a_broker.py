"""Births, Wills and everything malformed, over a real broker into a real hub."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from pathlib import Path

import anyio
import msgspec
import pytest

from appliance.core.fleet import LARGEST_DOCUMENT_BYTES, Command, CommandResult, DeviceState, Reported, down, up
from appliance.core.messaging import Message
from appliance.hub.device_records import Which
from tests.fleet.broker import Broker, Peer
from tests.hub.hubs import (
    born,
    hub_process,
    hub_settings,
    looking_at,
    lost,
    report_message,
    running_hub,
    state_message,
    until,
    until_device,
    until_hub_is,
    will_of,
)

pytestmark = pytest.mark.anyio

DEVICE = "box-1"


async def test_a_birth_a_lost_connection_and_a_return(tmp_path: Path, broker: Broker) -> None:
    async with running_hub(hub_settings(tmp_path / "hub", broker)) as hub:
        async with Peer(broker.options(DEVICE), will=will_of(DEVICE, 1)) as device:
            await device.link.publish(state_message(DEVICE, born(1)))
            found = await until_device(hub, DEVICE, lambda each: each.status == "online", "online")
            assert (found.epoch, found.instance, found.agent) == (1, "a", "1.0")
        # The block's end cancels the connection, which leaves the Will to the broker.
        await until_device(hub, DEVICE, lambda each: each.status == "lost", "lost")
        async with Peer(broker.options(DEVICE), will=will_of(DEVICE, 2)) as device:
            await device.link.publish(state_message(DEVICE, born(2)))
            await until_device(hub, DEVICE, lambda each: (each.status, each.epoch) == ("online", 2), "back")


async def test_a_replayed_old_will_changes_nothing(tmp_path: Path, broker: Broker) -> None:
    async with running_hub(hub_settings(tmp_path / "hub", broker)) as hub, Peer(broker.options(DEVICE)) as device:
        await device.link.publish(state_message(DEVICE, born(7)))
        before = await until_device(hub, DEVICE, lambda each: each.epoch == 7, "born")
        await device.link.publish(state_message(DEVICE, lost(6)))
        await device.link.publish(report_message(DEVICE, Reported(1, 0)))
        after = await until_device(hub, DEVICE, lambda each: each.reported_version == 1, "reported")
    assert (after.status, after.epoch, after.began) == ("online", 7, before.began)
    assert after.quarantined is None


async def test_an_old_wills_epoch_is_remembered_over_a_restart_of_the_hub(tmp_path: Path, broker: Broker) -> None:
    settings = hub_settings(tmp_path / "hub", broker)
    async with Peer(broker.options(DEVICE)) as device:
        async with running_hub(settings) as hub:
            await device.link.publish(state_message(DEVICE, born(7)))
            await until_device(hub, DEVICE, lambda each: each.epoch == 7, "born")
        await device.link.publish(state_message(DEVICE, lost(6)))  # the broker keeps it, and hands it out again
        async with running_hub(settings) as hub:
            await device.link.publish(report_message(DEVICE, Reported(1, 0)))
            after = await until_device(hub, DEVICE, lambda each: each.reported_version == 1, "reported")
    assert (after.status, after.epoch) == ("online", 7)


async def test_two_installations_in_turns_are_a_clone_and_are_quarantined(
    tmp_path: Path, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_hub(hub_settings(tmp_path / "hub", broker)) as hub:
        async with Peer(broker.options(DEVICE)) as device:
            await device.link.publish(state_message(DEVICE, born(1, "first")))
            await device.link.publish(state_message(DEVICE, born(1, "second", at=5.0)))
            moved = await until_device(hub, DEVICE, lambda each: each.instance == "second", "moved")
            assert moved.quarantined is None, "a box may be set up anew"
            await device.link.publish(state_message(DEVICE, born(2, "first", at=9.0)))
            found = await until_device(hub, DEVICE, lambda each: each.quarantined is not None, "in quarantine")
        assert found.instance == "second", "the clone's word is not believed"
        assert [each.kind for each in hub.means.devices.events(DEVICE)] == ["clone", "moved"]
        assert hub.means.devices.counts()["quarantined"] == 1
    assert "Two boxes use the identity box-1" in caplog.text


async def test_a_copied_disk_shows_in_one_epoch_that_began_twice(tmp_path: Path, broker: Broker) -> None:
    async with running_hub(hub_settings(tmp_path / "hub", broker)) as hub, Peer(broker.options(DEVICE)) as device:
        await device.link.publish(state_message(DEVICE, born(4, at=100.0)))
        await device.link.publish(state_message(DEVICE, born(4, at=100.0)))  # once more: MQTT may do that
        await device.link.publish(report_message(DEVICE, Reported(1, 0)))
        once = await until_device(hub, DEVICE, lambda each: each.reported_version == 1, "reported")
        assert once.quarantined is None
        await device.link.publish(state_message(DEVICE, born(4, at=107.0)))
        await until_device(hub, DEVICE, lambda each: each.quarantined is not None, "in quarantine")


MALFORMED = [
    (up(DEVICE, "state"), b""),
    (up(DEVICE, "state"), b"{"),
    (up(DEVICE, "state"), b"\xff\xfe"),
    (up(DEVICE, "state"), b"[" * 60_000),
    (up(DEVICE, "state"), b'{"epoch": -1, "status": "online", "at": 1, "agent": "1", "instance": "a"}'),
    (up(DEVICE, "state"), b'{"epoch": 1e300, "status": "online", "at": 1, "agent": "1", "instance": "a"}'),
    (up(DEVICE, "state"), b'{"epoch": 1, "status": "happy", "at": 1, "agent": "1", "instance": "a"}'),
    (up(DEVICE, "state"), b'{"epoch": 1, "status": "online", "at": 1, "agent": "1", "instance": ""}'),
    (up(DEVICE, "state"), msgspec.json.encode(DeviceState(1, "online", 1.0, "1", "x" * 65))),
    (up(DEVICE, "state"), b" " * (LARGEST_DOCUMENT_BYTES + 1)),
    (up(DEVICE, "rep"), b'{"version": "one"}'),
    (up(DEVICE, "req"), b"{}"),
    (up(DEVICE, "res"), b'{"id": 4}'),
    (up(DEVICE, "res"), b'{"id": "nobody-asked", "ok": true}'),
    (up(DEVICE, "rep") + "/more", b"{}"),
    (f"ea/1/up/{DEVICE}/unknown", b"{}"),
    (f"ea/1/up/{DEVICE}", b"{}"),
]


async def test_whatever_is_malformed_changes_nothing_and_is_logged_once(
    tmp_path: Path, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "appliance.hub")
    async with running_hub(hub_settings(tmp_path / "hub", broker)) as hub, Peer(broker.options(DEVICE)) as device:
        for topic, payload in MALFORMED:
            await device.link.publish(Message(topic, payload))
        assert hub.means.devices.find(DEVICE) is None
        await device.link.publish(state_message(DEVICE, born(1)))
        await until_device(hub, DEVICE, lambda each: each.status == "online", "online all the same")
    said = [each for each in caplog.records if "was refused" in each.getMessage()]
    assert len(said) == 1, [each.getMessage() for each in said]


async def test_nobody_speaks_for_another_device(tmp_path: Path, broker: Broker) -> None:
    async with running_hub(hub_settings(tmp_path / "hub", broker)) as hub:
        async with Peer(broker.options("box-2")) as stranger:
            with contextlib.suppress(Exception):
                await stranger.link.publish(state_message(DEVICE, born(9)))
            await stranger.link.publish(state_message("box-2", born(1)))
            await until_device(hub, "box-2", lambda each: each.status == "online", "its own birth")
        assert hub.means.devices.find(DEVICE) is None


async def test_a_hub_killed_before_its_commit_gets_the_births_again(tmp_path: Path, broker: Broker) -> None:
    settings = hub_settings(tmp_path / "hub", broker)
    devices = [f"box-{number}" for number in range(1, 13)]
    async with Peer(broker.options("watcher"), "ea/1/all/hub") as watcher:
        with hub_process(settings) as process:
            await until_hub_is(watcher, "up")
            # Another process holds the database, so nothing that comes now can be committed.
            with looking_at(settings) as beside:
                held, release = asyncio.Event(), asyncio.Event()
                holding = asyncio.create_task(_hold(beside, held, release))
                await asyncio.wait_for(held.wait(), 10)
                async with contextlib.AsyncExitStack() as stack:
                    for name in devices:
                        peer = await stack.enter_async_context(Peer(broker.options(name)))
                        await peer.link.publish(state_message(name, born(3), retain=False))
                    process.send_signal(signal.SIGKILL)
                    process.wait(timeout=20)
                    release.set()
                    await holding
                assert not beside.list(Which(), limit=100), "nothing was committed"
        with hub_process(settings), looking_at(settings) as beside:
            await until(lambda: len(beside.list(Which(), limit=100)) == len(devices), "every birth came again")
            assert {each.epoch for each in beside.list(Which(), limit=100)} == {3}


async def _hold(beside: object, held: asyncio.Event, release: asyncio.Event) -> None:
    """Keep others from writing to the database until told otherwise."""
    loop = asyncio.get_running_loop()
    until_released = asyncio.run_coroutine_threadsafe

    def block(_: object) -> None:
        loop.call_soon_threadsafe(held.set)
        until_released(release.wait(), loop).result(timeout=60)

    await beside._database.write(block)  # type: ignore[attr-defined]


async def test_the_devices_hear_whether_the_hub_is_there(tmp_path: Path, broker: Broker) -> None:
    async with Peer(broker.options("watcher"), "ea/1/all/hub") as watcher:
        async with running_hub(hub_settings(tmp_path / "hub", broker)):
            await until_hub_is(watcher, "up")
        await until_hub_is(watcher, "down")
        with hub_process(hub_settings(tmp_path / "hub", broker)) as process:
            await until_hub_is(watcher, "up")
            process.send_signal(signal.SIGKILL)
            await until_hub_is(watcher, "down")  # the Will
        with hub_process(hub_settings(tmp_path / "hub", broker)) as process:
            await until_hub_is(watcher, "up")
            process.send_signal(signal.SIGTERM)
            await until_hub_is(watcher, "down")
            assert process.wait(timeout=20) == 0


async def test_who_does_not_come_back_to_a_broker_without_memory_counts_as_lost(
    tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.hub.devices.SEEN_EVERY_S", 0.1)
    settings = hub_settings(tmp_path / "hub", broker)
    async with running_hub(settings) as hub, contextlib.AsyncExitStack() as stack:
        for name in (DEVICE, "box-2"):
            peer = await stack.enter_async_context(Peer(broker.options(name)))
            await peer.link.publish(state_message(name, born(1)))
            await until_device(hub, name, lambda each: each.status == "online", "online")
    broker.restart(memory=False)
    monkeypatch.setattr("appliance.hub.devices.RECONNECT_S", 3.0)
    async with Peer(broker.options("box-2")) as back, running_hub(settings) as hub:
        await back.link.publish(state_message("box-2", born(2)))
        await until_device(hub, DEVICE, lambda each: each.status == "lost", "lost, for nobody said otherwise")
        assert (hub.means.devices.get("box-2").status, hub.means.devices.get("box-2").epoch) == ("online", 2)


async def test_a_command_from_the_command_line_goes_by_way_of_the_running_hub(tmp_path: Path, broker: Broker) -> None:
    settings = hub_settings(tmp_path / "hub", broker)
    with hub_process(settings):
        async with Peer(broker.options(DEVICE), down(DEVICE, "cmd"), "ea/1/all/hub") as device:
            await until_hub_is(device, "up")
            await device.link.publish(state_message(DEVICE, born(1)))
            with looking_at(settings) as beside:
                await until(lambda: beside.find(DEVICE), "born")
            program = [sys.executable, "-m", "appliance", "hub", "devices", "command", DEVICE, "ping", "--json"]
            async with asyncio.TaskGroup() as tasks:
                asked = tasks.create_task(
                    anyio.run_process([*program, "--data", str(settings.data_dir)], check=False), name="ask"
                )
                sent = msgspec.json.decode((await device.next(60)).payload, type=Command)
                reply = msgspec.json.encode(CommandResult(sent.id, True, {"pong": 1}))
                await device.link.publish(Message(up(DEVICE, "res"), reply))
            answered = asked.result()
    assert answered.returncode == 0, answered.stderr
    assert msgspec.json.decode(answered.stdout)["result"] == {"pong": 1}
