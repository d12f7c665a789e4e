"""Hubs in tests: in this process or in one of their own, at a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from appliance.core.clock import SystemClock
from appliance.core.fleet import HUB_TOPIC, DeviceState, HubState, Reported, up
from appliance.core.hub_settings import HubSettings
from appliance.core.messaging import Message
from appliance.hub.authority import Authority
from appliance.hub.command_store import SqliteCommands
from appliance.hub.device_records import Device
from appliance.hub.device_store import SqliteDevices
from appliance.hub.init import HubFiles
from appliance.hub.room import Hub, open_hub
from appliance.hub.schema import MIGRATIONS
from appliance.messaging.connection import Will
from appliance.store.database import Database
from appliance.store.files import write_file
from appliance.store.grouped import GroupedWrites
from tests.fleet.broker import Broker, Peer

PATIENCE_S = 60.0


def hub_settings(folder: Path, broker: Broker, **changes: Any) -> HubSettings:
    """Return the settings of a hub at a broker, with the folder that it needs."""
    settings = HubSettings(data_dir=folder, broker_port=broker.port, port=0, **changes)
    if not settings.certificates_dir.exists():
        settings.certificates_dir.mkdir(parents=True)
        files = broker.hub()
        shutil.copy(files.authority, settings.authority_path)
        shutil.copy(files.certificate, settings.hub_certificate_path)
        shutil.copy(files.key, settings.hub_key_path)
        write_file(HubFiles.of(settings).authority_key, broker.authority.identity.key, private=True)
        Authority(folder, SystemClock()).create()
    return settings


@asynccontextmanager
async def running_hub(settings: HubSettings) -> AsyncIterator[Hub]:
    """Run a hub in this process; when the block ends, it stops in order."""
    async with open_hub(settings) as hub, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(hub.run())
        try:
            await until(lambda: hub.link.up, "the hub is up")
            yield hub
        finally:
            hub.stop()
            async with asyncio.timeout(PATIENCE_S):
                await running


@contextmanager
def hub_process(settings: HubSettings) -> Iterator[subprocess.Popen[bytes]]:
    """Run a hub in a process of its own, until it is killed or the block ends."""
    command = [sys.executable, "-m", "appliance", "hub", "serve", "--data", str(settings.data_dir)]
    command += ["--broker-port", str(settings.broker_port), "--port", "0", "--log-format", "json"]
    with (settings.data_dir / "hub.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait(timeout=PATIENCE_S)


async def until(holds: Callable[[], Any], what: str) -> Any:
    """Wait until something holds, and return it."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := holds()):
        assert time.monotonic() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.01)
    return value


async def until_hub_is(peer: Peer, status: str) -> None:
    """Wait until a peer that reads the hub's topic hears of a status."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            message = await peer.received.get()
            if message.topic == HUB_TOPIC and msgspec.json.decode(message.payload, type=HubState).status == status:
                return


@contextmanager
def looking_at(settings: HubSettings) -> Iterator[SqliteDevices]:
    """Look at a hub's devices from beside it."""
    with closing(Database(settings.database_path, migrations=MIGRATIONS)) as database:
        yield SqliteDevices(database, GroupedWrites(database), SystemClock())


@contextmanager
def commands_beside(settings: HubSettings) -> Iterator[SqliteCommands]:
    """Use a hub's commands from beside it, as the command line does."""
    with closing(Database(settings.database_path, migrations=MIGRATIONS)) as database:
        yield SqliteCommands(database, GroupedWrites(database), SystemClock())


def state_message(device: str, state: DeviceState, *, retain: bool = True) -> Message:
    """Return a state as a device publishes it."""
    return Message(up(device, "state"), msgspec.json.encode(state), retain=retain)


def born(epoch: int, instance: str = "a", at: float | None = None) -> DeviceState:
    """Return the first state of a session."""
    return DeviceState(epoch, "online", float(epoch) if at is None else at, "1.0", instance)


def lost(epoch: int, instance: str = "a") -> DeviceState:
    """Return what the Will of a session says."""
    return DeviceState(epoch, "lost", float(epoch), "1.0", instance)


def will_of(device: str, epoch: int, *, delay_s: int = 0) -> Callable[[], Will]:
    """Return the Will of a device's session."""
    return lambda: Will(state_message(device, lost(epoch)), delay_s)


def report_message(device: str, reported: Reported) -> Message:
    """Return a reported twin as a device publishes it."""
    return Message(up(device, "rep"), msgspec.json.encode(reported), retain=True)


async def until_device(hub: Hub, device: str, holds: Callable[[Device], bool], what: str) -> Device:
    """Wait until a device is known to a hub and something holds of it."""

    def look() -> Device | None:
        found = hub.means.devices.find(device)
        return found if found is not None and holds(found) else None

    found = await until(look, f"{device}: {what}")
    assert isinstance(found, Device)
    return found
