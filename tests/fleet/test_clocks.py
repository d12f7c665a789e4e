"""A clock at 1970, ten years ahead, or jumping back: jobs go by the hub's time, and no pause lasts for years."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from appliance.core.fleet import Job
from appliance.fleet.hub_watch import HubClock, HubWatch
from appliance.registry.install import import_model
from tests.fleet.links import KeptLink
from tests.fleet.updating import MODEL, Releases, UpdatingBox, sealed, tiny_model
from tests.store.clocks import SetClock

pytestmark = pytest.mark.anyio
NOW = 1_800_000_000.0
TEN_YEARS = 10 * 365.25 * 86_400


class Bench:
    """A box whose own clock is set by hand, and that may have heard what time the hub has."""

    def __init__(self, folder: Path, wall: float, *, heard: bool) -> None:
        self.clock = SetClock(wall)
        self.watch = HubWatch(self.clock)
        if heard:
            self.watch.learn_time(NOW)
        self.releases = Releases(folder / "released")
        self.box = UpdatingBox(
            folder / "data",
            KeptLink(),
            self.releases,
            clock=HubClock(self.clock, self.watch),
            folders=[self.releases.folder],
        )
        tiny_model(folder / "old.gguf", seed=0)
        import_model(folder / "old.gguf", self.box.registry, name=MODEL, version="1")
        self.job = self.releases.add(tiny_model(folder / "new.gguf"))

    def unchanged(self) -> None:
        assert self.box.registry.resolve(MODEL).version == "1"
        assert [each.full_name for each in self.box.registry.list()] == ["tiny:1"]
        assert self.box.journal.floor(MODEL) == 0


@pytest.fixture
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    wall, heard = request.param
    bench = Bench(tmp_path, wall, heard=heard)
    yield bench
    bench.box.close()


def job_of(bench: Bench, **changes: float) -> Job:
    return msgspec.structs.replace(bench.job, **changes)


@pytest.mark.parametrize("opened", [(0.0, True), (NOW + TEN_YEARS, True)], indirect=True, ids=["1970", "ahead"])
async def test_a_wrong_clock_neither_expires_a_job_nor_opens_its_window_once_the_hub_told_the_time(
    opened: Bench,
) -> None:
    later = job_of(opened, not_before=NOW + 3600.0, expires=NOW + 7200.0)
    assert await opened.box.updates.take(sealed(later))
    await opened.box.until("reserved")
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        running = group.create_task(opened.box.updates.run())
        for _ in range(50):
            await asyncio.sleep(0)
        running.cancel()
    assert opened.box.states(later.id)[-1] == "reserved", "its window is not open"
    opened.unchanged()
    opened.clock.pass_(3601.0)
    report = await opened.box.until("confirmed", "failed", "rejected")
    assert (report.state, report.code) == ("confirmed", "")
    assert NOW + 3600.0 <= report.at <= NOW + 7200.0, "reports have the hub's time too"


@pytest.mark.parametrize("opened", [(0.0, True), (NOW + TEN_YEARS, True)], indirect=True, ids=["1970", "ahead"])
async def test_a_job_expires_by_the_hubs_time_whatever_the_box_believes(opened: Bench) -> None:
    late = job_of(opened, expires=NOW - 1.0)
    assert await opened.box.updates.take(sealed(late))
    report = await opened.box.until("confirmed", "failed", "rejected")
    assert (report.state, report.code) == ("failed", "expired")
    opened.unchanged()


@pytest.mark.parametrize("opened", [(NOW + TEN_YEARS, False)], indirect=True)
async def test_a_clock_that_jumps_back_in_a_pause_costs_no_more_than_the_pause(
    opened: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is away; the box's clock is ten years ahead when the trouble begins, and right afterwards."""
    assert await opened.box.updates.take(sealed(opened.job))
    opened.releases.away = True
    monkeypatch.setattr("appliance.fleet.update_machine.FIRST_PAUSE_S", 60.0)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        running = group.create_task(opened.box.updates.run())
        while not _paused(opened):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        running.cancel()
    opened.unchanged()
    opened.releases.away = False
    opened.clock.wall = NOW
    assert (await opened.box.until("confirmed", "failed", "rejected")).state == "confirmed"


def _paused(bench: Bench) -> bool:
    entry = bench.box.journal.current()
    return entry is not None and entry.update.retry_at > NOW + TEN_YEARS


@pytest.mark.parametrize("opened", [(NOW, False)], indirect=True)
async def test_a_clock_that_jumps_back_in_a_trial_neither_ends_nor_repeats_it(opened: Bench) -> None:
    opened.box.versions.soaks = None
    assert await opened.box.updates.take(sealed(job_of(opened, expires=NOW + 3600.0)))
    await opened.box.until("trial")
    opened.clock.wall = 0.0
    opened.box.versions.soaks = True
    assert (await opened.box.until("confirmed", "failed", "rolled_back", "canceled")).state == "confirmed"
    assert opened.box.versions.tests == ["tiny:2"]
    assert opened.box.journal.floor(MODEL) == 2
