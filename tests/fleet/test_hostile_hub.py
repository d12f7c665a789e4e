"""A hub that misbehaves, behind a real broker: whatever it sends, the box installs what it should or nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from appliance.core.clock import SystemClock
from appliance.core.fleet import (
    PIECE_BYTES,
    ROOT,
    Answer,
    Block,
    Job,
    JobReport,
    Question,
    down,
)
from appliance.core.messaging import Message, Subscription
from appliance.fleet.asking import Questions
from appliance.hub.blocks import Blocks
from appliance.messaging.connection import Connection
from appliance.registry.install import import_model
from appliance.security.certificates import HUB_NAME
from tests.fleet.broker import Broker
from tests.fleet.links import until
from tests.fleet.updating import DEVICE, MODEL, Releases, UpdatingBox, sealed, tiny_model

pytestmark = pytest.mark.anyio
FINAL = frozenset({"confirmed", "failed", "rejected", "rolled_back", "canceled"})


class HostileHub:
    """Serves blocks, answers questions and takes reports as a hub does, unless a test makes it do otherwise.

    Attributes:
        reports: What the device told.
        current: The envelope that it answers the question for the job with.
        deaf: It never acknowledges a report.
    """

    def __init__(self, broker: Broker, releases: Releases, box: UpdatingBox) -> None:
        self.releases = releases
        self.box = box
        self.reports: list[JobReport] = []
        self.current = b""
        self.deaf = False
        self.blocks_sent = 0
        self.link = Connection(
            broker.options(HUB_NAME),
            self._receive,
            subscriptions=[Subscription(f"{ROOT}/up/#", qos=1)],
            uniform=lambda: 0.05,
        )
        self.blocks = Blocks(releases.folder, self, SystemClock(), bytes_per_s=20_000_000, refuse=lambda *_: None)

    # It stands between its blocks and the wire

    @property
    def connected(self) -> bool:
        return self.link.connected

    async def publish(self, message: Message) -> None:
        for each in self.bend(message):
            await self.link.publish(each)
        self.blocks_sent += 1

    def bend(self, message: Message) -> list[Message]:
        return [message]

    async def send(self, job: Job, *, retain: bool = True) -> None:
        self.current = sealed(job)
        await self.link.publish(Message(down(DEVICE, "job"), self.current, retain=retain))

    async def _receive(self, message: Message) -> None:
        kind = message.topic.split("/")[4]
        if kind == "blk":
            await self.blocks.handle(DEVICE, "blk", "", message)
        elif kind == "job":
            report = msgspec.json.decode(message.payload, type=JobReport)
            self.reports.append(report)
            if not self.deaf:
                self.box.updates.acknowledged(report.sequence)
        elif kind == "req":
            question = msgspec.json.decode(message.payload, type=Question)
            assert question.kind == "job"
            assert message.response_topic
            answer = msgspec.msgpack.encode(Answer(ok=True, data=self.current))
            await self.link.publish(Message(message.response_topic, answer, correlation=message.correlation))

    def ended(self, job: str) -> str | None:
        return next((each.state for each in self.reports if each.job == job and each.state in FINAL), None)


class Box(UpdatingBox):
    """A box whose link is a real connection."""

    def __init__(self, folder: Path, broker: Broker, releases: Releases) -> None:
        self.link = Connection(
            broker.options(DEVICE),
            self._receive,
            subscriptions=[Subscription(f"{ROOT}/dn/{DEVICE}/+", qos=1)],
            on_connected=self._greet,
            uniform=lambda: 0.05,
        )
        super().__init__(folder, self.link, releases)
        self.jobs = 0
        self.questions = Questions(DEVICE, self.link)
        self.updates._asking = self.questions

    async def _receive(self, message: Message) -> None:
        kind = message.topic.rpartition("/")[2]
        self.jobs += kind == "job"
        if kind in ("job", "blk"):
            await self.updates.handle(kind, message)  # type: ignore[arg-type]
        else:
            await self.questions.handle("res", message)

    async def _greet(self) -> None:
        await self.updates.connected()


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    return Releases(tmp_path / "released")


@pytest.fixture
def job(releases: Releases, tmp_path: Path) -> Job:
    return releases.add(tiny_model(tmp_path / "new.gguf", embedding=192))


@pytest.fixture
def box(tmp_path: Path, broker: Broker, releases: Releases) -> Iterator[Box]:
    opened = Box(tmp_path / "data", broker, releases)
    tiny_model(tmp_path / "old.gguf", seed=0)
    import_model(tmp_path / "old.gguf", opened.registry, name=MODEL, version="1")
    yield opened
    opened.close()


@asynccontextmanager
async def connected(box: Box, hub: HostileHub) -> AsyncIterator[None]:
    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        tasks = [group.create_task(each.run()) for each in (hub.link, hub.blocks, box.link, box.updates)]
        await hub.link.until_connected()
        await box.link.until_connected()
        try:
            yield
        finally:
            for each in tasks:
                each.cancel()


def only_the_old_one(box: Box) -> None:
    assert box.registry.resolve(MODEL).version == "1"
    assert [each.full_name for each in box.registry.list()] == ["tiny:1"]
    assert box.journal.floor(MODEL) == 0


def only_the_new_one_beside_it(box: Box, job: Job) -> None:
    assert box.registry.resolve(MODEL).version == "2"
    assert [each.full_name for each in box.registry.list()] == ["tiny:1", "tiny:2"]
    assert list(box.blobs.partial_folder.iterdir()) == []
    assert (box.journal.floor(MODEL), box.journal.newest()) == (2, job.version)


async def test_jobs_that_come_twice_late_and_out_of_order_are_one_update(
    box: Box, broker: Broker, releases: Releases, job: Job, tmp_path: Path
) -> None:
    old = msgspec.structs.replace(job, id="older", version=1)
    hub = HostileHub(broker, releases, box)
    async with connected(box, hub):
        for each in (job, job, old, job, old):
            await hub.send(each, retain=False)
        await until(lambda: hub.ended(job.id), timeout_s=60)
        await hub.send(old)
        await hub.send(job)
        before = len(hub.reports)
        cancel = Job(DEVICE, "cancels", 3, "cancel")
        await hub.send(cancel)
        await until(lambda: hub.ended("cancels"), timeout_s=60)
        assert {each.job for each in hub.reports[before:]} == {"cancels"}
    assert hub.ended(job.id) == "confirmed"
    assert box.versions.tests == ["tiny:2"], "it was tried once"
    assert hub.ended("older") is None
    only_the_new_one_beside_it(box, cancel)


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\x00" * 70_000, b"{" * 50_000, b'{"payload":"","payloadType":"","signatures":[]}', os.urandom(3000)],
    ids=["empty", "oversized", "deep", "unsigned", "random"],
)
async def test_what_is_no_job_is_dropped_and_the_next_one_is_taken(
    box: Box, broker: Broker, releases: Releases, job: Job, garbage: bytes
) -> None:
    hub = HostileHub(broker, releases, box)
    foreign = sealed(msgspec.structs.replace(job, version=9))[:-20] + b"x" * 20
    async with connected(box, hub):
        for payload in (garbage, foreign):
            await hub.link.publish(Message(down(DEVICE, "job"), payload, retain=bool(payload)))
        await until(lambda: box.jobs >= 2, timeout_s=60)
        assert box.journal.newest() == 0
        only_the_old_one(box)
        await hub.send(job)
        await until(lambda: hub.ended(job.id), timeout_s=60)
    assert hub.ended(job.id) == "confirmed"
    only_the_new_one_beside_it(box, job)


async def test_a_job_that_the_broker_confirmed_and_lost_is_asked_for_in_the_next_session(
    box: Box, broker: Broker, releases: Releases, job: Job
) -> None:
    hub = HostileHub(broker, releases, box)
    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        tasks = [group.create_task(each.run()) for each in (hub.link, hub.blocks)]
        await hub.link.until_connected()
        await hub.send(job)  # PUBACK; the box is away
        await asyncio.to_thread(broker.restart, memory=False)
        await hub.link.until_connected()
        tasks += [group.create_task(each.run()) for each in (box.link, box.updates)]
        await until(lambda: hub.ended(job.id), timeout_s=60)
        for each in tasks:
            each.cancel()
    assert hub.ended(job.id) == "confirmed"
    only_the_new_one_beside_it(box, job)


async def test_reports_that_were_confirmed_by_the_broker_and_lost_are_sent_again(
    box: Box, broker: Broker, releases: Releases, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.fleet.updates.REPORT_AGAIN_S", 0.2)
    hub = HostileHub(broker, releases, box)
    hub.deaf = True
    async with connected(box, hub):
        await hub.send(job)
        await until(lambda: box.journal.floor(MODEL) == 2 and hub.reports, timeout_s=60)
        assert {each.sequence for each in hub.reports} == {hub.reports[0].sequence}, "the first holds the others back"
        hub.deaf = False
        await asyncio.to_thread(broker.restart, memory=False)
        await until(lambda: hub.ended(job.id), timeout_s=60)
    sequences = [each.sequence for each in hub.reports]
    assert sequences[1:] == sorted(sequences[1:])
    assert hub.reports[-1].state == "confirmed"


class Bending(HostileHub):
    """Bends blocks on their way, the first time that each comes."""

    how = ""

    def __init__(self, broker: Broker, releases: Releases, box: UpdatingBox) -> None:
        super().__init__(broker, releases, box)
        self.kept: list[Message] = []
        self.seen: set[int] = set()

    def bend(self, message: Message) -> list[Message]:
        index = msgspec.msgpack.decode(message.payload, type=Block).index
        if index in self.seen or index % 5:
            return [message]
        self.seen.add(index)
        match self.how:
            case "dropped":
                return []
            case "duplicated":
                return [message, message]
            case "reordered":
                self.kept.append(message)
                return self.kept[:1] if len(self.kept) > 1 else []
            case _:
                return [Message(message.topic, b"\xff" * 300_000, qos=0), message]


@pytest.mark.parametrize("how", ["dropped", "duplicated", "reordered", "oversized"])
async def test_blocks_that_are_bent_on_a_real_wire_cost_time_only(
    box: Box, broker: Broker, releases: Releases, job: Job, how: str
) -> None:
    hub = Bending(broker, releases, box)
    hub.how = how
    async with connected(box, hub):
        await hub.send(job)
        await until(lambda: hub.ended(job.id), timeout_s=60)
    assert hub.seen
    assert hub.ended(job.id) == "confirmed"
    only_the_new_one_beside_it(box, job)


class Deleting(HostileHub):
    """Deletes the file at the hub once a few blocks of it are sent."""

    def bend(self, message: Message) -> list[Message]:
        if self.blocks_sent == 3:
            for each in self.releases.folder.iterdir():
                each.unlink()
        return [message]


async def test_a_file_that_is_deleted_at_the_hub_in_the_middle_ends_the_update_and_changes_nothing(
    box: Box, broker: Broker, releases: Releases, job: Job
) -> None:
    assert any(each.stat().st_size > PIECE_BYTES for each in releases.folder.iterdir())
    hub = Deleting(broker, releases, box)
    async with connected(box, hub):
        await hub.send(job)
        await until(lambda: hub.ended(job.id), timeout_s=60)
    assert [(each.state, each.code) for each in hub.reports if each.state in FINAL] == [("failed", "gone")]
    only_the_old_one(box)
    assert list(box.blobs.partial_folder.iterdir()) == []
