"""A model over a thin link: how much of the link it uses, what commands feel of it, and what kills cost.

    python -m tests.benchmarks.fleet.download [--megabytes 100] [--kills 20] [--json PATH]

A real mosquitto with the hub's configuration, the hub's own part that serves blocks, and a device in a process of its
own behind `tests.fleet.shaping`, whose docstring says how the link is modelled. The share of the link counts the file's
bytes against what the link could have carried between the first request and the end. Extra bytes of a run with kills
against one without are counted twice: as what reached the device's program, and as what was put on the link, where each
kill also costs what was on its way: half a round trip there, half a round trip until the broker hears of it, and what
waits behind a lost segment. On a full link of 2 MB/s that is 0.17 s or 330 kB, with 20 kills 6.6 % of 100 MB and the
halves of 20 blocks; so what was interrupted keeps less on its way, see `appliance.fleet.window_size`, and takes longer.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from appliance.core.clock import SystemClock
from appliance.core.fleet import PIECE_BYTES, ROOT, Command, UpKind, down
from appliance.core.messaging import Message, Subscription
from appliance.fleet.pieces import hashes_of
from appliance.hub.blocks import Blocks
from appliance.messaging.connection import Connection
from appliance.security.certificates import HUB_NAME
from tests.fleet.broker import Broker
from tests.fleet.shaping import Link

DEVICE = "box-1"
PING_EVERY_S = 0.5
LIMIT_S = 900.0

TARGET_SHARE, TARGET_ROUND_TRIP_S, TARGET_EXTRA = 0.85, 0.5, 0.05


@dataclass(frozen=True, slots=True)
class Run:
    """What one download showed; times in seconds."""

    seconds: float
    idle_seconds: float
    first_request: float
    last_byte: float
    received: int
    bytes_down: int
    bytes_up: int
    stalls: int
    kills: int
    connections: int
    round_trips: int
    round_trip_median: float
    round_trip_p95: float
    round_trip_most: float
    idle_round_trip: float


class Hub:
    """Serves blocks and times commands."""

    def __init__(self, broker: Broker, folder: Path) -> None:
        self.link = Connection(
            broker.options(HUB_NAME),
            self.receive,
            subscriptions=[Subscription(f"{ROOT}/up/+/blk", qos=0), Subscription(f"{ROOT}/up/+/res")],
        )
        self.blocks = Blocks(folder, self.link, SystemClock(), refuse=lambda *_: None)
        self.round_trips: list[float] = []
        self.first_request: float | None = None
        self._answered: dict[bytes, asyncio.Event] = {}

    async def receive(self, message: Message) -> None:
        _, _, kind = message.topic.removeprefix(f"{ROOT}/up/").partition("/")
        if kind == "res":
            self._answered.pop(message.correlation or b"", asyncio.Event()).set()
            return
        self.first_request = self.first_request or time.monotonic()
        kinds: UpKind = "blk"
        await self.blocks.handle(DEVICE, kinds, "", message)

    async def ping(self) -> None:
        """Send commands for ever, each once the one before was answered or given up."""
        number = 0
        while True:
            number += 1
            correlation, answered = str(number).encode(), asyncio.Event()
            self._answered[correlation] = answered
            payload = msgspec.json.encode(Command(f"ping-{number}", "ping"))
            began = time.monotonic()
            await self.link.publish(Message(down(DEVICE, "cmd"), payload, expiry_s=5, correlation=correlation))
            try:
                await asyncio.wait_for(answered.wait(), 5.0)
                self.round_trips.append(time.monotonic() - began)
            except TimeoutError:
                self._answered.pop(correlation, None)  # the device was dead
            await asyncio.sleep(PING_EVERY_S)


async def main() -> None:
    given = _options()
    content = random.Random(1).randbytes(given.megabytes * 1_000_000)
    with tempfile.TemporaryDirectory(prefix="download-") as name:
        folder = Path(name)
        whole = await _measure(folder / "whole", content, given.link, kills=0)
        killed = await _measure(folder / "killed", content, given.link, kills=given.kills) if given.kills else None
    _print(whole, killed, len(content), given.json)


async def _measure(folder: Path, content: bytes, shape: dict[str, float], *, kills: int) -> Run:
    released, device, broker_folder = (folder / each for each in ("released", "device", "broker"))
    for each in (released, device, broker_folder):
        each.mkdir(parents=True)
    digest = hashlib.sha256(content).hexdigest()
    (released / f"sha256-{digest}").write_bytes(content)
    chunks = (content[at : at + PIECE_BYTES] for at in range(0, len(content), PIECE_BYTES))
    (device / "pieces").write_bytes(hashes_of(chunks))
    broker = Broker(broker_folder)
    broker.device(DEVICE)
    broker.start()
    try:
        async with asyncio.timeout(LIMIT_S), _hub(broker, released) as hub, Link(broker.port, **shape) as link:  # type: ignore[arg-type]
            command = [device, link.port, DEVICE, broker_folder, digest, len(content)]
            seconds = await _download(hub, link, [str(each) for each in command], kills, len(content))
    finally:
        broker.stop()
    assert hashlib.sha256((device / "models" / "partial" / f"sha256-{digest}").read_bytes()).hexdigest() == digest
    trips = hub.round_trips
    return Run(
        seconds=seconds,
        idle_seconds=link.down.idle_s,
        first_request=hub.first_request or 0.0,
        last_byte=link.down.free_at,
        received=int.from_bytes((device / "received").read_bytes(), "big"),
        bytes_down=link.down.bytes_passed,
        bytes_up=link.up.bytes_passed,
        stalls=link.down.stalls,
        kills=kills,
        connections=link.connections,
        round_trips=len(trips),
        round_trip_median=statistics.median(trips),
        round_trip_p95=sorted(trips)[int(0.95 * (len(trips) - 1))],
        round_trip_most=max(trips),
        idle_round_trip=link.round_trip_s,
    )


async def _download(hub: Hub, link: Link, arguments: list[str], kills: int, length: int) -> float:
    """Run the device until it is done, killing it when so many bytes have passed; return the seconds it took."""
    chance = random.Random(kills)
    due = sorted(chance.randrange(length) for _ in range(kills))
    async with asyncio.TaskGroup() as group:
        pinging = group.create_task(hub.ping())
        while True:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.fleet.download_child", *arguments), stdout=asyncio.subprocess.PIPE
            )
            try:
                if due:
                    await _until_passed(link, due.pop(0), process)
                    process.kill()
                await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
            if process.returncode == 0:
                break
            assert process.returncode == -9, process.returncode
        pinging.cancel()
    assert hub.first_request is not None
    return time.monotonic() - hub.first_request


async def _until_passed(link: Link, passed: int, process: asyncio.subprocess.Process) -> None:
    while link.down.bytes_passed < passed and process.returncode is None:  # noqa: ASYNC110  (bytes that pass announce nothing)
        await asyncio.sleep(0.005)


@asynccontextmanager
async def _hub(broker: Broker, released: Path) -> AsyncIterator[Hub]:
    hub = Hub(broker, released)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(hub.link.run()), group.create_task(hub.blocks.run())]
        await hub.link.until_connected()
        yield hub
        for each in tasks:
            each.cancel()


def _print(whole: Run, killed: Run | None, length: int, path: Path | None) -> None:
    capacity = 2e6 * whole.seconds
    share = length / capacity
    figures = {
        "share of the link": (share, f">= {TARGET_SHARE}"),
        "command round trip, median, s": (whole.round_trip_median, f"<= {TARGET_ROUND_TRIP_S}"),
        "command round trip, p95, s": (whole.round_trip_p95, f"<= {TARGET_ROUND_TRIP_S}"),
        "command round trip, most, s": (whole.round_trip_most, ""),
    }
    if killed is not None:
        extra = killed.received / whole.received - 1
        on_link = killed.bytes_down / whole.bytes_down - 1
        figures[f"extra bytes of {killed.kills} kills, on the link"] = (on_link, f"<= {TARGET_EXTRA}")
        figures[f"extra bytes of {killed.kills} kills, received"] = (extra, "")
        print(f"{'seconds; with kills':40} {whole.seconds:8.1f}; {killed.seconds:.1f}")
    for name, (value, target) in figures.items():
        print(f"{name:40} {value:8.3f} {target}{_verdict(value, target)}")
    print(f"whole: {whole}\nkilled: {killed}")
    if path is not None:
        path.write_text(json.dumps({"whole": asdict(whole), "killed": killed and asdict(killed)}, indent=2))


def _verdict(value: float, target: str) -> str:
    if not target:
        return ""
    sign, limit = target.split()
    return " reached" if (value >= float(limit) if sign == ">=" else value <= float(limit)) else " MISSED"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fleet.download")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--loss", type=float, default=0.02)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.link = {"bytes_per_s": 2e6, "round_trip_s": 0.1, "loss": given.loss}
    return given


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    asyncio.run(main())
