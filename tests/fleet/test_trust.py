"""What a device believes: the good case, offline, and each attack with what did not change."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from appliance.core.errors import UnavailableError
from appliance.fleet.signed_files import FolderAsking
from tests.fleet.trusting import Device, HandClock, Hub


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
