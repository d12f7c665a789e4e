"""What a device believes: the good case, offline, and each attack with what did not change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from appliance.core.clock import SystemClock
from appliance.core.errors import UnavailableError
from appliance.core.fleet import down
from appliance.fleet.asking import Questions
from appliance.fleet.schema import MIGRATIONS
from appliance.fleet.signed_files import FolderAsking, SignedFiles
from appliance.fleet.trust import Trust
from appliance.fleet.trust_record import TrustRecord
from appliance.hub.authority import Authority
from appliance.security.metadata import Client
from appliance.store.database import Database
from tests.fleet.broker import Broker, Peer
from tests.fleet.trusting import DEVICE, Device, HandClock, Hub
from tests.hub.hubs import hub_settings, running_hub


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path / "hub", HandClock())


@pytest.fixture
def device(tmp_path: Path, hub: Hub) -> Iterator[Device]:
    (tmp_path / "device").mkdir()
    each = Device(tmp_path / "device", hub)
    asyncio.run(each.enrol())
    with closing(each.database):
        yield each


def test_a_signed_release_is_believed(hub: Hub, device: Device) -> None:
    async def scenario() -> None:
        content = b"x" * (1024 * 1024 + 1)
        release = hub.release(content=content)
        job = await device.trust.open_job(hub.signed(hub.job(release)))
        assert await device.trust.verified_release(job) == release
        assert len(await device.trust.piece_list(release, release.files[0])) == 2

    asyncio.run(scenario())


def test_what_was_verified_can_be_looked_up_without_a_hub_and_after_a_restart(hub: Hub, device: Device) -> None:
    async def scenario() -> None:
        release = hub.release()
        job = hub.job(release)
        await device.trust.verified_release(job)
        await device.trust.piece_list(release, release.files[0])
        await device.trust.director_keys()
        hub.silent = True
        device.restart()
        assert await device.trust.verified_release(job) == release
        assert len(await device.trust.piece_list(release, release.files[0])) == 1
        assert (await device.trust.open_job(hub.signed(job))) == job

    asyncio.run(scenario())


def test_a_device_that_knows_nothing_yet_says_that_the_hub_is_away(hub: Hub, device: Device) -> None:
    hub.silent = True
    with pytest.raises(UnavailableError):
        asyncio.run(device.trust.current())


def test_a_second_look_costs_two_questions(hub: Hub, device: Device) -> None:
    asyncio.run(device.trust.refresh())
    hub.asked.clear()
    asyncio.run(device.trust.refresh())
    assert hub.asked == ["metadata/2.root.json", "metadata/timestamp.json"]


def test_the_same_pieces_are_believed_from_a_folder(hub: Hub, device: Device) -> None:
    release = hub.release()
    device.asking = FolderAsking(hub.authority.repository.folder)
    device.restart()
    assert asyncio.run(device.trust.verified_release(hub.job(release))) == release


def test_a_slow_look_that_a_quick_one_overtakes_turns_nothing_back(hub: Hub, device: Device) -> None:
    """The twin and the updates look by themselves; one reads the old timestamp and stops, the other sees a new one."""
    hub.release()
    files = SignedFiles(hub)
    other = Trust(DEVICE, TrustRecord(device.database), hub, built=device.built)

    async def slowly(path: str, most: int) -> bytes | None:
        data = await files.fetch(path, most)
        if path.endswith("snapshot.json"):
            hub.release()
            await other.refresh()
        return data

    async def scenario() -> None:
        await Client(device.record, built=device.built).refresh(slowly, lambda: files.hub_time)
        assert {role: mark.version for role, mark in device.marks().items()} == {
            "timestamp": 3,
            "snapshot": 3,
            "targets": 3,
        }
        assert device.trust._client.recorded().versions()["targets"] == 3

    asyncio.run(scenario())


@pytest.mark.anyio
async def test_the_running_hub_gives_a_device_its_repository(tmp_path: Path, broker: Broker) -> None:
    settings = hub_settings(tmp_path / "hub", broker)
    authority = Authority(tmp_path / "hub", SystemClock())
    authority.change_targets({"notes/large": b"x" * 200_000})
    async with running_hub(settings), Peer(broker.options(DEVICE), down(DEVICE, "res")) as box:
        questions = Questions(DEVICE, box.link)

        async def receive() -> None:
            while True:
                await questions.handle("res", await box.received.get())

        with closing(Database(tmp_path / "fleet.db", migrations=MIGRATIONS)) as database:
            record = TrustRecord(database)
            await record.anchor(authority.root())
            async with asyncio.TaskGroup() as tasks:
                receiving = tasks.create_task(receive())
                trust = Trust(DEVICE, record, questions)
                verified = await trust.refresh()
                files = SignedFiles(questions)
                data = await files.fetch(verified.target("notes/large").stored, 200_000)
                assert verified.check("notes/large", data or b"") == b"x" * 200_000
                assert abs(files.hub_time - time.time()) < 60
                assert len((await trust.director_keys()).keys) == 1
                receiving.cancel()
