"""A disk that is full at any step of an update: what runs stays as it is, and the update goes on when there is room."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from appliance.core.fleet import Job
from appliance.fleet.journal import Entry
from appliance.fleet.update_machine import Effect, Event, Stumbled
from appliance.registry.install import import_model
from tests.fleet.links import KeptLink
from tests.fleet.updating import DEVICE, MODEL, Releases, UpdatingBox, sealed, tiny_model

pytestmark = pytest.mark.anyio


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    return Releases(tmp_path / "released")


@pytest.fixture
def job(releases: Releases, tmp_path: Path) -> Job:
    return releases.add(tiny_model(tmp_path / "new.gguf"))


@pytest.fixture
def box(tmp_path: Path, releases: Releases, monkeypatch: pytest.MonkeyPatch) -> Iterator[UpdatingBox]:
    monkeypatch.setattr("appliance.fleet.update_machine.FIRST_PAUSE_S", 0.01)
    opened = UpdatingBox(tmp_path / "data", KeptLink(), releases, folders=[releases.folder])
    tiny_model(tmp_path / "old.gguf", seed=0)
    import_model(tmp_path / "old.gguf", opened.registry, name=MODEL, version="1")
    yield opened
    opened.close()


def unchanged(box: UpdatingBox, *, on_trial: bool) -> None:
    assert box.registry.resolve(MODEL).version == ("2" if on_trial else "1")
    assert box.registry.resolve("tiny:1").files[0].path.is_file()
    assert box.journal.floor(MODEL) == 0


@pytest.mark.parametrize("effect", ["verify", "reserve", "fetch", "stage", "activate", "settle"])
async def test_an_update_waits_for_room_at_any_step_and_changes_nothing_meanwhile(
    box: UpdatingBox, job: Job, effect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    perform = box.steps.perform
    met: list[Event] = []

    async def perform_without_room(due: Effect, entry: Entry) -> Event:
        if due != effect or len(met) == 2:
            return await perform(due, entry)
        with full_disk():
            met.append(await perform(due, entry))
        unchanged(box, on_trial=effect == "settle")
        return met[-1]

    monkeypatch.setattr(box.steps, "perform", perform_without_room)
    assert await box.updates.take(sealed(job))
    report = await box.until("confirmed", "failed", "rejected", "rolled_back")
    assert len(met) == 2
    assert all(isinstance(each, Stumbled) for each in met), met
    assert report.state == "confirmed"
    assert box.registry.resolve(MODEL).version == "2"
    assert box.journal.floor(MODEL) == 2
    assert list(box.blobs.partial_folder.iterdir()) == []
    states = [each.state for each in box.reports() if each.code]
    assert set(states) <= {"seen", "verified", "reserved", "fetching", "fetched", "staged", "trial"}


@pytest.mark.parametrize("effect", ["discard", "roll_back"])
async def test_what_an_update_began_is_undone_on_a_full_disk_too(
    box: UpdatingBox, job: Job, effect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going back waits until its wish can be written; what cannot be tidied up now is swept later."""
    perform = box.steps.perform
    reached, left = asyncio.Event(), 2

    async def perform_without_room(due: Effect, entry: Entry) -> Event:
        nonlocal left
        if due == ("settle" if effect == "roll_back" else "test"):
            reached.set()
            await asyncio.Event().wait()
        if due != effect or left == 0:
            return await perform(due, entry)
        left -= 1
        with full_disk():
            return await perform(due, entry)

    monkeypatch.setattr(box.steps, "perform", perform_without_room)
    assert await box.updates.take(sealed(job))

    async def cancel() -> None:
        await reached.wait()
        assert await box.updates.take(sealed(Job(DEVICE, "stop", 9, "cancel")))

    async with asyncio.TaskGroup() as group:
        group.create_task(cancel())
        report = await box.until("canceled", "confirmed", "failed", job=job.id)
    assert report.state == "canceled"
    assert left < 2
    assert box.registry.resolve(MODEL).version == "1"
    assert box.journal.floor(MODEL) == 0


async def test_a_journal_that_cannot_be_written_stops_the_update_and_nothing_else(box: UpdatingBox, job: Job) -> None:
    assert await box.updates.take(sealed(job))
    before = box.reports()
    for _ in range(3):
        with full_disk(), pytest.raises(ExceptionGroup):  # the agent starts the part again after a while
            async with asyncio.timeout(30):
                await box.updates.run()
        unchanged(box, on_trial=False)
        assert box.reports() == before
    assert (await box.until("confirmed", "failed", "rejected")).state == "confirmed"
    assert box.registry.resolve(MODEL).version == "2"
