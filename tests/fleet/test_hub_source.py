"""Blocks from the hub, whatever happens to them on the way; with a real broker at the end."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from appliance.core.clock import SystemClock
from appliance.core.errors import ApplianceError, SourceError, StorageError, UnavailableError
from appliance.core.fleet import ROOT, Block, BlockRequest, down, up
from appliance.core.messaging import Message, Subscription
from appliance.fleet.download import Download, Lies, reserve
from appliance.fleet.hub_source import HubBlocks
from appliance.fleet.journal import Journal
from appliance.fleet.pieces import PieceList
from appliance.fleet.schema import open_fleet_database
from appliance.fleet.sources import fetch
from appliance.hub.block_turns import asked_for
from appliance.hub.blocks import Blocks
from appliance.messaging.connection import Connection
from appliance.registry.blobs import Blobs
from appliance.security.certificates import HUB_NAME
from tests.fleet.broker import Broker
from tests.fleet.links import KeptLink
from tests.fleet.updating import DEVICE, piece_list

pytestmark = pytest.mark.anyio

CONTENT = random.Random(3).randbytes(5_300_000)
PIECES = piece_list(CONTENT)


class Target:
    """Where a file is fetched to, with its journal."""

    def __init__(self, folder: Path, pieces: PieceList = PIECES) -> None:
        self.pieces = pieces
        self.blobs = Blobs(folder / "models" / "blobs")
        self.database = open_fleet_database(folder / "fleet.db")
        self.journal = Journal(self.database, SystemClock())
        self.lies = Lies()
        if not self.path.exists():
            reserve(self.blobs, pieces)

    @property
    def path(self) -> Path:
        return self.blobs.partial_folder / f"sha256-{self.pieces.digest}"

    def open(self) -> Download:
        return Download(
            self.blobs,
            self.pieces,
            safe=self.journal.safe(self.pieces.digest),
            commit=self.journal.commit,
            clock=SystemClock(),
            lies=self.lies,
        )

    def is_right(self) -> bool:
        return hashlib.sha256(self.path.read_bytes()).hexdigest() == self.pieces.digest


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    opened = Target(tmp_path / "device")
    yield opened
    opened.database.close()


class Wire:
    """Carries requests to a hub's real part and blocks back, with faults.

    Attributes:
        fault: Takes a block's message and returns what arrives of it.
    """

    def __init__(self, folder: Path, fault: Callable[[Message], list[Message]] = lambda message: [message]) -> None:
        self.fault = fault
        self.requests = 0
        self.hub_link = KeptLink(self._down)
        self.hub = Blocks(folder, self.hub_link, SystemClock(), refuse=lambda *_: None)
        self.link = KeptLink(self._up)
        self.blocks = HubBlocks(DEVICE, self.link, SystemClock(), lambda: 0)
        self.blocks.connected()

    async def _up(self, message: Message) -> None:
        self.requests += 1
        await self.hub.handle(DEVICE, "blk", "", message)

    async def _down(self, message: Message) -> None:
        for each in self.fault(message):
            self.blocks.handle(each)

    async def deliver(self, target: Target, timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
            serving = group.create_task(self.hub.run())
            try:
                with target.open() as download:
                    await fetch(download, [self.blocks.source(patient=True)])
            except ApplianceError as error:
                self.error = error
            finally:
                serving.cancel()


@pytest.fixture
def released(tmp_path: Path) -> Path:
    folder = tmp_path / "released"
    folder.mkdir()
    (folder / f"sha256-{PIECES.digest}").write_bytes(CONTENT)
    return folder


def block_of(message: Message) -> Block:
    return msgspec.msgpack.decode(message.payload, type=Block)


def changed(message: Message, **changes: object) -> Message:
    payload = msgspec.msgpack.encode(msgspec.structs.replace(block_of(message), **changes))
    return Message(message.topic, payload, qos=0)


async def test_a_file_comes_block_by_block(target: Target, released: Path) -> None:
    wire = Wire(released)
    await wire.deliver(target)
    assert target.is_right()
    assert wire.requests < PIECES.block_count / 2


class Faults:
    """Each makes something of a block's message, now and then."""

    def __init__(self) -> None:
        self.chance = random.Random(7)
        self.kept: list[Message] = []

    def lost(self, message: Message) -> list[Message]:
        return [] if self.chance.random() < 0.05 else [message]

    def twice(self, message: Message) -> list[Message]:
        return [message, message]

    def reordered(self, message: Message) -> list[Message]:
        self.kept.append(message)
        if len(self.kept) < 2:
            return []
        return [self.kept.pop(), self.kept.pop()]

    def foreign(self, message: Message) -> list[Message]:
        return [changed(message, digest="0" * 64), changed(message, index=10_000), message]

    def oversized(self, message: Message) -> list[Message]:
        return [Message(message.topic, b"\xff" * 200_000, qos=0), message]


@pytest.mark.parametrize("fault", ["lost", "twice", "reordered", "foreign", "oversized"])
async def test_messages_that_are_lost_doubled_reordered_foreign_or_oversized_cost_time_only(
    target: Target, released: Path, fault: str
) -> None:
    await Wire(released, getattr(Faults(), fault)).deliver(target)
    assert target.is_right()


async def test_one_flipped_bit_costs_its_piece_and_no_more(target: Target, released: Path) -> None:
    flipped: list[int] = []

    def flip(message: Message) -> list[Message]:
        block = block_of(message)
        if block.index != 3 or flipped:
            return [message]
        flipped.append(block.index)
        return [changed(message, data=bytes([block.data[0] ^ 1]) + block.data[1:])]

    wire = Wire(released, flip)
    await wire.deliver(target)
    assert target.is_right()
    assert flipped
    assert len(wire.hub_link.sent) == PIECES.block_count + 16


async def test_a_hub_that_lies_twice_is_left_and_what_was_right_is_kept(target: Target, released: Path) -> None:
    def lie(message: Message) -> list[Message]:
        block = block_of(message)
        return [message] if block.index < 16 else [changed(message, data=bytes(len(block.data)))]

    wire = Wire(released, lie)
    await wire.deliver(target)
    assert isinstance(wire.error, SourceError)
    assert wire.error.code == "source_lied"
    with target.open() as download:
        assert 0 not in download.missing


async def test_a_block_of_another_length_is_a_lie(target: Target, released: Path) -> None:
    wire = Wire(released, lambda message: [changed(message, data=block_of(message).data[:-1])])
    await wire.deliver(target)
    assert wire.error.code == "source_lied"


async def test_a_file_that_is_deleted_at_the_hub_meanwhile_is_gone(target: Target, released: Path) -> None:
    path = released / f"sha256-{PIECES.digest}"

    def delete(message: Message) -> list[Message]:
        if block_of(message).index == 20:
            path.unlink(missing_ok=True)
        return [message]

    wire = Wire(released, delete)
    await wire.deliver(target)
    assert isinstance(wire.error, SourceError)
    assert wire.error.code == "gone"
    with target.open() as download:
        assert download.percent > 0, "what came is kept"


async def test_without_a_connection_the_impatient_give_up_and_the_patient_wait(target: Target, released: Path) -> None:
    wire = Wire(released)
    wire.link.connected = False
    with target.open() as download, pytest.raises(UnavailableError):
        await fetch(download, [wire.blocks.source(patient=False)])

    async def reconnect() -> None:
        await asyncio.sleep(0.05)
        wire.link.connected = True
        wire.blocks.connected()

    async with asyncio.TaskGroup() as group:
        group.create_task(reconnect())
        await wire.deliver(target)
    assert target.is_right()


async def test_a_full_disk_is_a_storage_error_and_what_came_before_stays(
    target: Target, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def write(descriptor: int, data: bytes, offset: int) -> None:
        written.append(offset)
        if len(written) > 30:
            raise OSError(28, "No space left on device")
        original(descriptor, data, offset)

    from appliance.fleet import download as module

    original = module.write_all
    monkeypatch.setattr(module, "write_all", write)
    wire = Wire(released)
    await wire.deliver(target)
    assert isinstance(wire.error, StorageError)
    assert wire.error.code == "disk_full"
    monkeypatch.setattr(module, "write_all", original)
    wire = Wire(released)
    await wire.deliver(target)
    assert target.is_right()
    sent = {block_of(each).index for each in wire.hub_link.sent}
    assert len(sent) <= PIECES.block_count - 29, "blocks that were written are not asked for again"


MOST_WAITING = 20


def busy_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let nothing be written until the event is set, and few blocks wait for it."""
    from appliance.fleet import download, hub_source

    free = threading.Event()
    original = download.write_all

    def write(descriptor: int, data: bytes, offset: int) -> None:
        assert free.wait(60.0)
        original(descriptor, data, offset)

    monkeypatch.setattr(download, "write_all", write)
    monkeypatch.setattr(hub_source, "_MOST_QUEUED", MOST_WAITING)
    return free


async def until_busy(wire: Wire) -> None:
    await wire.hub_link.wait_for(MOST_WAITING, timeout_s=30.0)
    for _ in range(100):
        await asyncio.sleep(0)


async def test_blocks_are_asked_for_while_the_disk_is_busy_but_not_without_end(
    target: Target, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = busy_disk(monkeypatch)
    wire = Wire(released)
    async with asyncio.TaskGroup() as group:
        group.create_task(wire.deliver(target))
        try:
            await until_busy(wire)
            assert len(wire.hub_link.sent) == MOST_WAITING
        finally:
            free.set()
    assert target.is_right()


async def test_a_download_that_is_given_up_keeps_every_block_that_has_come(
    target: Target, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = busy_disk(monkeypatch)
    wire = Wire(released)
    async with asyncio.TaskGroup() as group:
        delivering = group.create_task(wire.deliver(target))
        try:
            await until_busy(wire)
            delivering.cancel()
        finally:
            free.set()
        await asyncio.wait({delivering})
    with target.open() as opened:
        assert len(opened.missing_blocks()) == PIECES.block_count - MOST_WAITING


async def test_a_download_that_was_interrupted_asks_for_little_at_a_time(target: Target, released: Path) -> None:
    path = released / f"sha256-{PIECES.digest}"

    def delete(message: Message) -> list[Message]:
        if block_of(message).index == 40:
            path.unlink(missing_ok=True)
        return [message]

    first = Wire(released, delete)
    await first.deliver(target)
    assert not target.is_right()
    path.write_bytes(CONTENT)
    second = Wire(released)
    await second.deliver(target)
    assert target.is_right()
    assert largest_request(first) > 4
    assert largest_request(second) <= 2, "less than 64 blocks have come"


async def test_waiting_for_the_first_connection_is_no_interruption(target: Target, released: Path) -> None:
    wire = Wire(released)
    wire.link.connected = False

    async def connect() -> None:
        await asyncio.sleep(0.05)
        wire.link.connected = True
        wire.blocks.connected()

    async with asyncio.TaskGroup() as group:
        group.create_task(connect())
        await wire.deliver(target)
    assert target.is_right()
    assert largest_request(wire) > 4


def largest_request(wire: Wire) -> int:
    requests = [msgspec.msgpack.decode(each.payload, type=BlockRequest) for each in wire.link.sent]
    return max(len(asked_for(each.first, each.missing)) for each in requests)


async def test_hints_that_lie_cost_a_piece_and_no_more(target: Target, released: Path) -> None:
    hints = target.path.with_name(target.path.name + ".blocks")
    hints.write_bytes(b"\x01" * 20 + b"\xff" * 5)
    await Wire(released).deliver(target)
    assert target.is_right()


async def test_what_the_hub_cannot_understand_is_told_and_hurts_nobody(released: Path) -> None:
    told: list[str] = []
    hub = Blocks(
        released, KeptLink(), SystemClock(), refuse=lambda device, reason, _: told.append(f"{device} {reason}")
    )
    await hub.handle("box-9", "blk", "", Message(up("box-9", "blk"), b"\xc1"))
    evil = {"digest": "../../etc/passwd", "first": 0, "missing": b"\x01"}
    await hub.handle("box-9", "blk", "", Message(up("box-9", "blk"), msgspec.msgpack.encode(evil)))
    assert told == ["box-9 bad_block_request"] * 2


async def test_a_capped_hub_keeps_to_its_rate(released: Path) -> None:
    link = KeptLink()
    hub = Blocks(released, link, SystemClock(), bytes_per_s=2_000_000, refuse=lambda *_: None)
    request = BlockRequest(PIECES.digest, 0, b"\xff\x03")
    await hub.handle(DEVICE, "blk", "", Message(up(DEVICE, "blk"), msgspec.msgpack.encode(request)))
    began = asyncio.get_running_loop().time()
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(hub.run())
        await link.wait_for(10)
        serving.cancel()
    assert asyncio.get_running_loop().time() - began > 9 * 65_536 / 2_000_000 * 0.9


# With a real broker


@asynccontextmanager
async def real(broker: Broker, released: Path) -> AsyncIterator[tuple[Connection, HubBlocks]]:
    """Connect a device and a hub that serves blocks."""

    async def to_hub(message: Message) -> None:
        await hub.handle(DEVICE, "blk", "", message)

    async def to_device(message: Message) -> None:
        blocks.handle(message)

    async def greet() -> None:
        blocks.connected()

    hub_link = Connection(
        broker.options(HUB_NAME), to_hub, subscriptions=[Subscription(f"{ROOT}/up/+/blk", qos=0)], uniform=lambda: 0.1
    )
    hub = Blocks(released, hub_link, SystemClock(), bytes_per_s=4_000_000, refuse=lambda *_: None)
    link = Connection(
        broker.options(DEVICE),
        to_device,
        subscriptions=[Subscription(down(DEVICE, "blk"), qos=0)],
        on_connected=greet,
        uniform=lambda: 0.1,
    )
    blocks = HubBlocks(DEVICE, link, SystemClock(), lambda: 0)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each.run()) for each in (hub_link, hub, link)]
        await hub_link.until_connected()
        await link.until_connected()
        yield link, blocks
        for each in tasks:
            each.cancel()


async def test_a_broker_that_restarts_without_its_memory_costs_a_pause_and_no_more(
    target: Target, released: Path, broker: Broker
) -> None:
    async with asyncio.timeout(60), real(broker, released) as (link, blocks):
        with target.open() as download:

            async def restart() -> None:
                while download.percent < 20:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(broker.restart, memory=False)

            async with asyncio.TaskGroup() as group:
                group.create_task(restart())
                await fetch(download, [blocks.source(patient=True)])
        assert link.figures.connects == 2
    assert target.is_right()
