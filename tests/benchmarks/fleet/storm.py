"""Thousands of simulated devices on one hub and one mosquitto: the first rush, a steady while, a broker's restart.

    python -m tests.benchmarks.fleet.storm --devices 10000 --minutes 3

Broker, hub and simulation are three processes on one machine, the hub's folder as `appliance hub init` makes it, and
all connections are mutual TLS. Every device sends its birth, its reported twin and a batch of telemetry each minute.
What the simulation itself costs is told too: on a small machine it takes more than the hub and the broker together.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import uvloop

from appliance.core.clock import SystemClock
from appliance.core.hub_settings import HubSettings
from appliance.hub.init import HubDocument, HubFiles, init_hub, load_authority
from appliance.hub.schema import MIGRATIONS
from appliance.hub.simulation.fleet import SPARE_DESCRIPTORS, SimulatedFleet, allow_descriptors
from appliance.hub.simulation.identities import SimulatedIdentities
from appliance.hub.simulation.run import connection_options, make_known
from appliance.hub.simulation.traits import Scenario
from appliance.store.database import Database
from tests.fleet.broker import MOSQUITTO, free_port

PATIENCE_S = 300.0
SETTLE_S = 30.0

Figures = dict[str, float]


@dataclass(slots=True)
class Ends:
    """The two processes at the other end."""

    settings: HubSettings
    broker: subprocess.Popen[bytes] | None = None
    hub: subprocess.Popen[bytes] | None = None
    most_memory: dict[str, int] = field(default_factory=dict)

    def start_broker(self) -> None:
        assert MOSQUITTO is not None, "mosquitto is not installed; on Debian: apt-get install mosquitto"
        log = (self.settings.data_dir / "mosquitto.log").open("ab")
        self.broker = subprocess.Popen([MOSQUITTO, "-c", HubFiles.of(self.settings).configuration], stderr=log)
        log.close()

    def start_hub(self) -> None:
        command = [sys.executable, "-m", "appliance", "hub", "serve", "--data", str(self.settings.data_dir)]
        command += ["--broker-port", str(self.settings.broker_port), "--port", "0"]
        log = (self.settings.data_dir / "hub.log").open("ab")
        self.hub = subprocess.Popen(command, stdout=log, stderr=log)
        log.close()

    def restart_broker(self) -> None:
        assert self.broker is not None
        self.broker.terminate()
        self.broker.wait(timeout=60)
        self.start_broker()

    def stop(self) -> None:
        for process in (self.hub, self.broker):
            if process is not None:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=60)

    def look(self) -> None:
        """Note how much memory each takes now."""
        for name, process in (("hub", self.hub), ("broker", self.broker)):
            if process is not None and process.poll() is None:
                used = psutil.Process(process.pid).memory_info().rss
                self.most_memory[name] = max(used, self.most_memory.get(name, 0))

    def cpu(self) -> Figures:
        """Return seconds of CPU that each has taken."""
        found = {"simulation": time.process_time()}
        for name, process in (("hub", self.hub), ("broker", self.broker)):
            if process is not None:
                times = psutil.Process(process.pid).cpu_times()
                found[name] = times.user + times.system
        return found


def main() -> None:
    """Measure and print, as a table and as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10_000, help="how many (%(default)s)")
    parser.add_argument("--minutes", type=float, default=3.0, help="of the steady while (%(default)s)")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end with it
    allow_descriptors(given.devices + SPARE_DESCRIPTORS)  # before the broker is started, which inherits it
    with tempfile.TemporaryDirectory() as folder, ends(Path(folder)) as found:
        figures = uvloop.run(measure(found, given.devices, given.minutes))
    for name, value in figures.items():
        print(f"{name:<44} {value:,.3f}".rstrip("0").rstrip("."))
    print(json.dumps(figures))


@contextmanager
def ends(folder: Path) -> Iterator[Ends]:
    """Make a hub, start its broker and it, and stop both."""
    settings = HubSettings(data_dir=folder / "hub", broker_port=free_port())
    init_hub(settings, HubDocument("localhost", settings.broker_port), SystemClock())
    found = Ends(settings)
    try:
        found.start_broker()
        found.start_hub()
        yield found
    finally:
        found.stop()


async def measure(found: Ends, devices: int, minutes: float) -> Figures:
    """Let the fleet live, and return what came of it."""
    settings = found.settings
    names = [f"sim-{number}" for number in range(devices)]
    await asyncio.to_thread(_make_known, settings, names)
    with tempfile.TemporaryDirectory() as folder:
        identities = SimulatedIdentities(Path(folder), load_authority(settings), time.time())
        for name in names:
            identities.tls(name).context()
        fleet = SimulatedFleet(
            names,
            Scenario(batch_every_s=60.0),
            lambda name: connection_options(settings, name, identities.tls(name)),
            SystemClock(),
            life=int(time.time()),
        )
        figures: Figures = {"devices": devices, "load of the machine before": os.getloadavg()[0]}
        async with _living(fleet, found):
            figures |= await _phases(fleet, found, devices, minutes)
        figures |= {f"most memory of the {name}, MB": used / 1e6 for name, used in found.most_memory.items()}
    return figures


async def _phases(fleet: SimulatedFleet, found: Ends, devices: int, minutes: float) -> Figures:
    cpu = found.cpu()
    figures = {"first rush: all connected after, s": await _until(lambda: fleet.figures().connected == devices)}
    figures["first rush: all births committed after, s"] = await _until(lambda: _online(found) == devices)
    for name, used in found.cpu().items():
        figures[f"first rush: CPU of the {name}, s"] = used - cpu[name]
    _say(figures)
    await asyncio.sleep(SETTLE_S)
    fleet.forget_latencies()
    before, cpu = fleet.figures(), found.cpu()
    batches, committed = before.batches, before.committed
    await asyncio.sleep(60 * minutes)
    after = fleet.figures()
    figures["steady: batches a minute"] = (after.batches - batches) / minutes
    figures["steady: commits a minute"] = (after.committed - committed) / minutes
    figures["steady: publish to commit and back, median, s"] = after.p50_s
    figures["steady: publish to commit and back, p99, s"] = after.p99_s
    figures |= {
        f"steady: CPU of the {name}, cores": (used - cpu[name]) / 60 / minutes for name, used in found.cpu().items()
    }
    _say(figures)
    connects, cpu = after.connects, found.cpu()
    found.restart_broker()
    figures["restart: all connected again after, s"] = await _until(
        lambda: fleet.figures().connects >= connects + devices and fleet.figures().connected == devices
    )
    figures["restart: CPU of the simulation, s"] = found.cpu()["simulation"] - cpu["simulation"]
    figures["restart: CPU of the broker, s"] = found.cpu()["broker"]
    _say(figures)
    figures["restart: all acknowledged after, s"] = await _until(
        lambda: fleet.figures().batches - fleet.figures().committed <= devices / 60
    )
    fleet.stop_telling()
    await _until(lambda: fleet.figures().batches == fleet.figures().committed)
    last = fleet.figures()
    figures["rows that the devices made"] = last.batches * Scenario().rows
    figures["rows in the hub's database"] = await asyncio.to_thread(_rows, found.settings)
    figures["batches not committed"] = last.batches - last.committed
    figures["devices online at the hub"] = _online(found)
    return figures


@contextlib.asynccontextmanager
async def _living(fleet: SimulatedFleet, found: Ends) -> AsyncIterator[None]:
    async def look() -> None:
        while True:
            found.look()
            await asyncio.sleep(1.0)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(fleet.run()), group.create_task(look())]
        yield
        for task in tasks:
            task.cancel()


async def _until(holds: Callable[[], bool]) -> float:
    """Return the seconds until something holds, infinity if it does not in five minutes."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > PATIENCE_S:
            return float("inf")
        await asyncio.sleep(0.25)
    return time.monotonic() - began


def _say(figures: Figures) -> None:
    print(json.dumps(figures), file=sys.stderr, flush=True)


def _make_known(settings: HubSettings, names: list[str]) -> None:
    make_known(settings, names)


def _online(found: Ends) -> int:
    return _count(found.settings, "SELECT count(*) FROM devices WHERE status = 'online'")


def _rows(settings: HubSettings) -> int:
    return _count(settings, "SELECT count(*) FROM telemetry_rows")


def _count(settings: HubSettings, query: str) -> int:
    with closing(Database(settings.database_path, migrations=MIGRATIONS)) as database:
        return int(database.read(lambda connection: connection.execute(query).fetchone()[0]))


if __name__ == "__main__":
    main()
