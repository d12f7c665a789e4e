"""A simulation from beginning to end, beside a hub: its authority signs, and the devices are made known to it."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import uvloop

from appliance.core.clock import SystemClock
from appliance.core.errors import InvalidRequestError
from appliance.core.fleet import DEVICE_ID
from appliance.core.hub_settings import HubSettings
from appliance.hub.device_rows import expect_device
from appliance.hub.init import load_authority
from appliance.hub.schema import MIGRATIONS
from appliance.hub.simulation.figures import SimulationFigures
from appliance.hub.simulation.fleet import SPARE_DESCRIPTORS, SimulatedFleet, allow_descriptors
from appliance.hub.simulation.identities import SimulatedIdentities
from appliance.hub.simulation.traits import Scenario
from appliance.messaging.options import ConnectionOptions, TlsFiles
from appliance.store.database import Connection, Database

KEEPALIVE_S = 240
TIMEOUT_S = 30.0
PROGRESS_S = 5.0

Progress = Callable[[SimulationFigures], None]


def simulate(
    settings: HubSettings, devices: int, prefix: str, scenario: Scenario, *, seconds: float, progress: Progress
) -> SimulationFigures:
    """Simulate devices until the time is over, until all are lost on purpose, or until Ctrl-C.

    Args:
        settings: Of the hub, whose folder must be here.
        devices: How many.
        prefix: Their ids are this and a number.
        scenario: What they do.
        seconds: How long; 0 is until Ctrl-C.
        progress: Called every few seconds.

    Raises:
        InvalidRequestError: The prefix cannot begin an id.
        NotFoundError: There is no hub in the folder.
        SettingsError: This process may not open so many sockets.
    """
    names = [f"{prefix}{number}" for number in range(devices)]
    if not DEVICE_ID.fullmatch(names[-1]):
        raise InvalidRequestError(f"No device's id can begin with {prefix!r}.", param="prefix")
    allow_descriptors(devices + SPARE_DESCRIPTORS)
    authority = load_authority(settings)
    make_known(settings, names)
    with tempfile.TemporaryDirectory(prefix="appliance-simulation-") as folder:
        identities = SimulatedIdentities(Path(folder), authority, time.time())

        def options(name: str) -> ConnectionOptions:
            return connection_options(settings, name, identities.tls(name))

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(names, scenario, options, seconds, progress))


def connection_options(settings: HubSettings, name: str, tls: TlsFiles) -> ConnectionOptions:
    """Return how a simulated device connects to the hub's broker."""
    return ConnectionOptions(
        settings.broker_host, settings.broker_port, name, tls=tls, keepalive_s=KEEPALIVE_S, timeout_s=TIMEOUT_S
    )


def make_known(settings: HubSettings, names: list[str]) -> None:
    """Enter devices in the hub's database, as their enrolment would."""
    now = time.time()

    def write(connection: Connection) -> None:
        for name in names:
            expect_device(connection, name, now)

    with closing(Database(settings.database_path, migrations=MIGRATIONS)) as database, asyncio.Runner() as runner:
        runner.run(database.write(write))


async def _run(
    names: list[str],
    scenario: Scenario,
    options: Callable[[str], ConnectionOptions],
    seconds: float,
    progress: Progress,
) -> SimulationFigures:
    # The seconds since 1970 rise from one simulation to the next, as epochs and boots must.
    fleet = SimulatedFleet(names, scenario, options, SystemClock(), life=int(time.time()))
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, over.set)
    if seconds:
        loop.call_later(seconds, over.set)
    async with asyncio.TaskGroup() as group:
        living = group.create_task(fleet.run(), name="simulated fleet")
        living.add_done_callback(lambda _: over.set())
        telling = group.create_task(_tell(fleet, progress), name="progress")
        await over.wait()
        found = fleet.figures()
        living.cancel()
        telling.cancel()
    return found


async def _tell(fleet: SimulatedFleet, progress: Progress) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        progress(fleet.figures())
