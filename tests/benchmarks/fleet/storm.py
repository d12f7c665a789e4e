"""Thousands of simulated devices on one hub and one mosquitto: the first rush, a steady while, a broker's restart.

    python -m tests.benchmarks.fleet.storm --devices 10000 --minutes 1 --rollout canary

Broker, hub and simulation are three processes on one machine, the hub's folder as `appliance hub init` makes it, and
all connections are mutual TLS. Every device sends its birth, its reported twin and a batch of telemetry each minute.
Then a release is signed and brought to all of them over the broker, and 1 % of the canaries fail. Births, reports and
rows are counted against the hub's database. What the simulation itself costs is told too: on a small machine it takes
more than the hub and the broker together.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
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
from typing import Literal, cast, get_args

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
from tests.hub.simulation.rollout import FAILING, Operator, Standing

PATIENCE_S = 300.0
SETTLE_S = 5.0
JOB_S = 10.0
WATCH_S = 15.0

Rollouts = Literal["none", "canary", "all"]

Figures = dict[str, float]


@dataclass(slots=True)
class Ends:
    """The two processes at the other end."""

    settings: HubSettings
    broker: subprocess.Popen[bytes] | None = None
    hub: subprocess.Popen[bytes] | None = None
    most_memory: dict[str, int] = field(default_factory=dict)
    earlier_broker_s: float = 0.0

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
        self.earlier_broker_s = self.cpu()["broker"]
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
                found[name] = times.user + times.system + (self.earlier_broker_s if name == "broker" else 0.0)
        return found


def main() -> None:
    """Measure and print, as a table and as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10_000, help="how many (%(default)s)")
    parser.add_argument("--minutes", type=float, default=3.0, help="of the steady while (%(default)s)")
    parser.add_argument(
        "--rollout",
        choices=get_args(Rollouts),
        default="none",
        help="a release to all, until a canary fails, or on to the end (%(default)s)",
    )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end with it
    allow_descriptors(given.devices + SPARE_DESCRIPTORS)  # before the broker is started, which inherits it
    with tempfile.TemporaryDirectory() as folder, ends(Path(folder)) as found:
        figures = uvloop.run(measure(found, given.devices, given.minutes, cast("Rollouts", given.rollout)))
    for name, value in figures.items():
        print(f"{name:<60} {value:,.3f}".rstrip("0").rstrip("."))
    for line in verdicts(figures):
        print(line)
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


async def measure(found: Ends, devices: int, minutes: float, rollout: Rollouts) -> Figures:
    """Let the fleet live, and return what came of it."""
    settings = found.settings
    names = [f"sim-{number}" for number in range(devices)]
    await asyncio.to_thread(make_known, settings, names)
    scenario = Scenario(batch_every_s=60.0, job_s=JOB_S, failing=FAILING if rollout != "none" else 0.0)
    with tempfile.TemporaryDirectory() as folder:
        identities = SimulatedIdentities(Path(folder), load_authority(settings), time.time())
        for name in names:
            identities.tls(name).context()
        fleet = SimulatedFleet(
            names,
            scenario,
            lambda name: connection_options(settings, name, identities.tls(name)),
            SystemClock(),
            life=int(time.time()),
        )
        gc.freeze()  # the contexts are there for good; looking through them again and again is not the fleet's cost
        gc.set_threshold(200_000, 50, 1000)  # nor is it that a thousand of them stand still for one another's garbage
        storm = Storm(found, fleet, names, scenario)
        storm.figures |= {"devices": devices, "load of the machine before": os.getloadavg()[0]}
        async with _living(fleet, found):
            await storm.rush()
            await storm.steady(minutes)
            await storm.restart()
            if rollout != "none":
                await storm.rollout(to_the_end=rollout == "all")
            await storm.end()
    storm.figures |= {f"most memory of the {name}, MB": used / 1e6 for name, used in found.most_memory.items()}
    return storm.figures


@dataclass(slots=True)
class Storm:
    """The phases, and what each told."""

    found: Ends
    fleet: SimulatedFleet
    names: list[str]
    scenario: Scenario
    figures: Figures = field(default_factory=dict)
    _name: str = ""

    async def rush(self) -> None:
        """Let all connect at once."""
        async with self._phase("first rush"):
            await self._until("all connected after, s", lambda: self.fleet.connected == len(self.names))
            await self._until("all births committed after, s", self._births_committed)

    async def steady(self, minutes: float) -> None:
        """Let them live for a while; whole minutes, since the hub speaks to all of them every minute."""
        await asyncio.sleep(SETTLE_S)
        before = self.fleet.figures()
        batches, committed = before.batches, before.committed
        async with self._phase("steady"):
            await asyncio.sleep(60 * minutes)
        after = self.fleet.figures()
        self.figures["steady: batches a minute"] = (after.batches - batches) / minutes
        self.figures["steady: commits a minute"] = (after.committed - committed) / minutes

    async def restart(self) -> None:
        """Restart the broker and see them come back."""
        connects = self.fleet.connects
        async with self._phase("restart"):
            self.found.restart_broker()
            await self._until(
                "all connected again after, s",
                lambda: self.fleet.connects >= connects + len(self.names) and self.fleet.connected == len(self.names),
            )
            await self._until("all births committed after, s", self._births_committed)

    async def rollout(self, *, to_the_end: bool) -> None:
        """Bring a release to all, of whose canaries 1 % fail; then, if asked for, accept that and go on."""
        operator = await asyncio.to_thread(Operator, self.found.settings)
        begun = await asyncio.to_thread(operator.begin, self.names, self.scenario)

        def stopped() -> bool:
            return operator.standing(begun.id).state != "running"

        async with self._phase("rollout"):
            await self._until("it stopped after, s", stopped)
            await asyncio.sleep(WATCH_S)  # in which nobody else may be given a job
        self._stands("rollout", operator.standing(begun.id))
        if to_the_end:
            operator.resume(begun.id)
            async with self._phase("gone on"):
                await self._until("it ended after, s", stopped)
            self._stands("gone on", operator.standing(begun.id))

    async def end(self) -> None:
        """Count what was made against what was kept."""
        self.fleet.stop_telling()
        self.figures["end: all acknowledged after, s"] = await _until(
            lambda: self.fleet.figures().batches == self.fleet.figures().committed
        )
        last = self.fleet.figures()
        settings = self.found.settings
        self.figures["end: rows that the devices made"] = last.batches * self.scenario.rows
        self.figures["end: rows in the hub's database"] = await asyncio.to_thread(_rows, settings)
        self.figures["end: batches not committed"] = last.batches - last.committed
        self.figures["end: births or reports not committed"] = len(self.fleet.said().items() - _said(settings).items())
        self.figures["end: devices online at the hub"] = _online(settings)

    @contextlib.asynccontextmanager
    async def _phase(self, name: str) -> AsyncIterator[None]:
        self.fleet.forget_latencies()
        cpu, began, repeated = self.found.cpu(), time.monotonic(), self.fleet.figures().repeated
        self._name = name
        yield
        after, took_s = self.fleet.figures(), time.monotonic() - began
        figures = {
            "lasted, s": took_s,
            "publish to commit and back, median, s": after.p50_s,
            "publish to commit and back, p99, s": after.p99_s,
            "said again because nothing came back": after.repeated - repeated,
        }
        for each, used in self.found.cpu().items():
            figures[f"CPU of the {each}, s"] = used - cpu.get(each, 0.0)
        self.figures |= {f"{name}: {what}": value for what, value in figures.items()}
        print(json.dumps(self.figures), file=sys.stderr, flush=True)

    async def _until(self, what: str, holds: Callable[[], bool]) -> None:
        self.figures[f"{self._name}: {what}"] = await _until(holds)

    def _births_committed(self) -> bool:
        return self.fleet.said() == _said(self.found.settings)

    def _stands(self, name: str, standing: Standing) -> None:
        seen = self.fleet.figures()
        print(f"{name}: {standing.state}, wave {standing.wave}: {standing.reason}", file=sys.stderr, flush=True)
        self.figures |= {
            f"{name}: paused at the canaries": float((standing.code, standing.wave) == ("canary_failed", 0)),
            f"{name}: completed": float(standing.state == "completed"),
            f"{name}: devices in it": sum(standing.members.values()),
            f"{name}: of these, failed": standing.members.get("failed", 0),
            f"{name}: devices for which a job was made": standing.given,
            f"{name}: devices that were given a job": seen.asked,
        }


def verdicts(figures: Figures) -> Iterator[str]:
    """Yield for each target whether it was reached."""
    devices = figures["devices"]
    lost = abs(figures["end: rows that the devices made"] - figures["end: rows in the hub's database"])
    unborn = figures["end: births or reports not committed"]
    canaries = max(1.0, devices // 100)
    measured: list[tuple[str, float, float]] = [
        ("all connected after the first rush, s", figures["first rush: all connected after, s"], 60.0),
        ("all connected after a broker's restart, s", figures["restart: all connected again after, s"], 60.0),
        ("births, reports and rows lost", lost + unborn, 0.0),
        ("memory of the hub, MB", figures["most memory of the hub, MB"], 400.0),
        *(
            (f"p99 from publish to commit and back, {phase}, s", figures[f"{phase}: {_P99}"], 2.0)
            for phase in ("first rush", "steady", "restart", "rollout")
            if f"{phase}: {_P99}" in figures
        ),
    ]
    if "rollout: devices in it" in figures:
        paused = figures["rollout: paused at the canaries"]
        measured += [
            ("rollouts with a failed canary that did not pause", 1.0 - paused, 0.0),
            (
                "devices that were given a job, the canaries included",
                figures["rollout: devices that were given a job"],
                canaries,
            ),
            ("devices for which a job was made", figures["rollout: devices for which a job was made"], canaries),
        ]
    if f"gone on: {_P99}" in figures:
        value = figures[f"gone on: {_P99}"]
        yield f"no target  p99 while up to half of them install, in {JOB_S:g} s each, s: {value:,.3f}"
    for what, value, most in measured:
        yield f"{'reached' if value <= most else 'MISSED'}  {what}: {value:,.3f}, at most {most:g}"


_P99 = "publish to commit and back, p99, s"


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
        await asyncio.sleep(0.5)
    return time.monotonic() - began


def _online(settings: HubSettings) -> int:
    return _count(settings, "SELECT count(*) FROM devices WHERE status = 'online'")


def _rows(settings: HubSettings) -> int:
    return _count(settings, "SELECT count(*) FROM telemetry_rows")


def _said(settings: HubSettings) -> dict[str, tuple[int, int]]:
    """Return what the hub knows of each device that is online: its epoch and the version of its reported twin."""
    sql = "SELECT id, epoch, reported_version FROM devices WHERE status = 'online'"
    with closing(Database(settings.database_path, migrations=MIGRATIONS)) as database:
        rows = database.read(lambda connection: connection.execute(sql).fetchall())
    return {str(name): (int(epoch), int(version)) for name, epoch, version in rows}


def _count(settings: HubSettings, query: str) -> int:
    with closing(Database(settings.database_path, migrations=MIGRATIONS)) as database:
        return int(database.read(lambda connection: connection.execute(query).fetchone()[0]))


if __name__ == "__main__":
    main()
