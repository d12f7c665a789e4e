"""A device that is killed at any write of its record: marks do not fall, and an honest hub is believed at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from appliance.core.errors import UntrustedError
from appliance.fleet.signed_files import FolderAsking
from appliance.fleet.trust import Trust
from appliance.fleet.trust_record import TrustRecord
from appliance.security.trust_rules import Mark
from tests.fleet.trusting import DAY, DEVICE, START, Device, HandClock, Hub


class DeadlyRecord(TrustRecord):
    """Kills the process before or after its n-th write."""

    left = 0
    before = True

    async def keep(self, role: str, document: bytes, marks: Mapping[str, Mark]) -> None:
        self.left -= 1
        if self.left == 0 and self.before:
            os.kill(os.getpid(), signal.SIGKILL)
        await super().keep(role, document, marks)
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    async def keep_file(self, digest: str, content: bytes) -> None:
        self.left -= 1
        if self.left == 0 and self.before:
            os.kill(os.getpid(), signal.SIGKILL)
        await super().keep_file(digest, content)
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_at(number: int, device_folder: Path, hub: Hub, *, before: bool) -> bool:
    """Refresh in a child that is killed at its write of this number; False if it came to an end."""
    child = os.fork()
    if child == 0:
        try:
            device = Device(device_folder, hub)
            record = DeadlyRecord(device.database)
            record.left, record.before = number, before
            asking = FolderAsking(hub.authority.repository.folder)
            trust = Trust(DEVICE, record, asking, built=START - DAY)
            asyncio.run(trust.director_keys(fresh=True))
        except BaseException:  # noqa: BLE001  (the child must not run the tests' own clean-up)
            os._exit(2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_device_that_is_killed_at_any_write_goes_on_from_there(tmp_path: Path, before: bool) -> None:
    hub = Hub(tmp_path / "hub", HandClock())
    device = Device(tmp_path, hub)
    asyncio.run(device.enrol())
    asyncio.run(device.trust.refresh())
    old = hub.metadata()
    device.database.close()
    hub.authority.rotate_online()  # a new root, then new timestamp, snapshot, targets and director: five writes
    marks: dict[str, Mark] = {}
    for number in range(1, 6):
        folder = tmp_path / f"device-{number}"
        folder.mkdir()
        for each in tmp_path.glob("fleet.db*"):
            (folder / each.name).write_bytes(each.read_bytes())
        assert killed_at(number, folder, hub, before=before)
        revived = Device(folder, hub)
        with closing(revived.database):
            marks = revived.marks()
            for role, mark in marks.items():
                assert mark.version <= hub.authority.roles().version(role)
            if "root" in marks and marks["root"].version == 2:
                hub.replay({name: data for name, data in old.items() if "root" not in name})
                with pytest.raises(UntrustedError):
                    asyncio.run(revived.trust.refresh())
                hub.lies.clear()
            keys = asyncio.run(revived.trust.director_keys(fresh=True))
            assert len(keys.keys) == 1
            assert revived.marks()["targets"].version == 2
    assert not killed_at(6, tmp_path / "device-1", hub, before=before)
