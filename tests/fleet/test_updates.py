"""Updates from the job to the confirmation, on real files, with a real registry and journal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from appliance.core.errors import UnavailableError
from appliance.core.fleet import Job, JobReport
from appliance.core.wishes import SelfTestReport
from appliance.fleet.journal import Entry
from appliance.fleet.staging import Box
from appliance.fleet.update_machine import Effect, Event
from appliance.registry.install import import_model
from appliance.security.signing import make_key
from tests.fleet.links import KeptLink
from tests.fleet.updating import DEVICE, MODEL, Releases, UpdatingBox, piece_list, sealed, tiny_model

pytestmark = pytest.mark.anyio


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    return Releases(tmp_path / "released")


@pytest.fixture
def box(tmp_path: Path, releases: Releases) -> Iterator[UpdatingBox]:
    """Return a box that has `tiny:1`, and the releases' files on a stick."""
    opened = UpdatingBox(tmp_path / "data", KeptLink(), releases, folders=[releases.folder])
    tiny_model(tmp_path / "old.gguf", seed=0)
    import_model(tmp_path / "old.gguf", opened.registry, name=MODEL, version="1")
    yield opened
    opened.close()


def meant(box: UpdatingBox) -> str:
    return box.registry.resolve(MODEL).version


async def test_a_release_is_verified_fetched_staged_tested_tried_and_confirmed(
    box: UpdatingBox, releases: Releases, tmp_path: Path
) -> None:
    content = tiny_model(tmp_path / "new.gguf", embedding=192)
    job = releases.add(content)
    assert await box.updates.take(sealed(job))
    report = await box.until("confirmed", "failed", "rejected")
    assert (report.state, report.percent, report.code) == ("confirmed", 100, "")
    assert box.states(job.id) == [
        *("seen", "verified", "reserved", "fetching", "fetched", "staged", "testing", "trial", "confirmed")
    ]
    assert box.versions.tests == ["tiny:2"]
    assert meant(box) == "2"
    assert box.registry.resolve("tiny:2").files[0].path.read_bytes() == content
    assert box.registry.resolve("tiny:1")
    assert box.journal.floor(MODEL) == 2
    assert sorted(each.name for each in box.blobs.partial_folder.iterdir()) == []


async def tidied(box: UpdatingBox) -> None:
    """Let the box work until it has nothing to do."""
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        working = group.create_task(box.updates.run())
        while box.journal.current() is not None or box.journal.leftover() is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        working.cancel()


async def run_until(box: UpdatingBox, job: Job, *states: str) -> JobReport:
    assert await box.updates.take(sealed(job))
    return await box.until(*(states or ("confirmed", "failed", "rejected", "rolled_back", "canceled")), job=job.id)


def nothing_changed(box: UpdatingBox) -> None:
    assert meant(box) == "1"
    assert [each.full_name for each in box.registry.list()] == ["tiny:1"]
    assert [path.name for path in box.blobs.folder.iterdir()] == [box.registry.resolve("tiny:1").files[0].path.name]
    assert sorted(path.name for path in box.blobs.partial_folder.iterdir()) == []
    assert box.journal.floor(MODEL) == 0


@pytest.fixture
def job(releases: Releases, tmp_path: Path) -> Job:
    return releases.add(tiny_model(tmp_path / "new.gguf"))


def again(job: Job, version: int, **changes: Any) -> Job:
    return msgspec.structs.replace(job, id=f"job-{version}", version=version, **changes)


async def test_a_job_that_another_key_signed_or_that_is_old_is_not_taken(box: UpdatingBox, job: Job) -> None:
    assert not await box.updates.take(sealed(job, make_key()))
    assert not await box.updates.take(b"{}")
    assert box.journal.newest() == 0
    assert await box.updates.take(sealed(job))
    assert not await box.updates.take(sealed(job))
    assert not await box.updates.take(sealed(again(job, 1)))
    assert [each.job for each in box.reports()] == [job.id]


async def test_a_release_that_is_not_signed_is_rejected_and_changes_nothing(box: UpdatingBox, job: Job) -> None:
    report = await run_until(box, again(job, 3, target="releases/tiny/9/release.json"))
    assert (report.state, report.code) == ("rejected", "not_released")
    nothing_changed(box)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hardware": ("jetson",)},
        {"least_agent": "99.0"},
        {"minimum_memory": 2**40},
        {"task": "tensor"},
        {"licence": "no such licence"},
    ],
)
async def test_a_release_that_is_not_for_this_box_is_rejected(
    tmp_path: Path, releases: Releases, wrong: dict[str, Any]
) -> None:
    fitting = Box("generic", "1.0", 2**30)
    opened = UpdatingBox(tmp_path / "data", KeptLink(), releases, folders=[releases.folder], box=fitting)
    report = await run_until(opened, releases.add(tiny_model(tmp_path / "new.gguf"), **wrong))
    assert (report.state, report.code) == ("rejected", "incompatible")
    assert opened.registry.list() == []
    opened.close()


async def test_a_failed_self_test_leaves_what_was_there(box: UpdatingBox, job: Job) -> None:
    box.versions.passes = SelfTestReport(False, "wrong_answer", "2 of 3 answers were wrong")
    report = await run_until(box, job)
    assert (report.state, report.code) == ("failed", "wrong_answer")
    nothing_changed(box)


async def test_the_first_version_ever_that_fails_leaves_none(tmp_path: Path, releases: Releases, job: Job) -> None:
    opened = UpdatingBox(tmp_path / "data", KeptLink(), releases, folders=[releases.folder])
    opened.versions.passes = SelfTestReport(False, "crashed", "signal 11")
    assert (await run_until(opened, job)).state == "failed"
    assert opened.registry.list() == []
    assert list(opened.blobs.folder.iterdir()) == []
    opened.close()


async def test_a_failed_soak_goes_back_and_is_not_tried_again_unless_it_is_forced(box: UpdatingBox, job: Job) -> None:
    box.versions.soaks = False
    report = await run_until(box, job)
    assert (report.state, report.code) == ("rolled_back", "soak_errors")
    await tidied(box)
    nothing_changed(box)
    box.versions.soaks = True
    report = await run_until(box, again(job, 3))
    assert (report.state, report.code) == ("rejected", "rolled_back_before")
    assert meant(box) == "1"
    report = await run_until(box, again(job, 4, force=True))
    assert (report.state, report.attempt) == ("confirmed", 3)
    assert meant(box) == "2"


@pytest.mark.parametrize("soaks", [False, None], ids=["failed", "canceled"])
async def test_the_first_version_ever_that_goes_back_from_its_trial_leaves_none(
    tmp_path: Path, releases: Releases, job: Job, soaks: bool | None
) -> None:
    opened = UpdatingBox(tmp_path / "data", KeptLink(), releases, folders=[releases.folder])
    opened.versions.soaks = soaks
    assert await opened.updates.take(sealed(job))
    await opened.until("trial", "rolled_back", job=job.id)
    if soaks is None:
        assert await opened.updates.take(sealed(Job(DEVICE, "stop", 9, "cancel")))
    await tidied(opened)
    assert opened.states(job.id)[-1] == ("rolled_back" if soaks is False else "canceled")
    assert opened.registry.list() == []
    assert list(opened.blobs.folder.iterdir()) == []
    assert opened.journal.floor(MODEL) == 0
    digest = releases.releases[job.target].files[0].digest
    assert (opened.journal.rolled_back(digest) is not None) == (soaks is False)
    opened.close()


async def test_a_version_that_went_back_stays_while_it_is_loaded_and_goes_after_a_restart(
    box: UpdatingBox, releases: Releases, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.fleet.updates.LOOK_AGAIN_S", 0.01)
    box.versions.soaks = None
    assert await box.updates.take(sealed(job))
    await box.until("trial", job=job.id)
    with box.registry.hold(box.registry.resolve("tiny:2")):
        box.versions.soaks = False
        box.versions.changed.set()
        assert (await box.until("rolled_back", "confirmed", job=job.id)).state == "rolled_back"
        assert box.journal.leftover() is not None
        assert [each.full_name for each in box.registry.list()] == ["tiny:1", "tiny:2"]
    box.close()
    second = UpdatingBox(tmp_path / "data", KeptLink(), releases)
    try:
        await tidied(second)
        nothing_changed(second)
    finally:
        second.close()


async def test_a_version_that_went_back_stays_if_somebody_wants_it_or_had_it_before(
    box: UpdatingBox, releases: Releases, job: Job, tmp_path: Path
) -> None:
    """What a person had imported before the update stays; and so does what he wished for after it."""
    content = tiny_model(tmp_path / "new.gguf")
    import_model(tmp_path / "new.gguf", box.registry, name=MODEL, version="2", licence="MIT")
    box.versions.kept.activate("tiny:1", origin="a person", soak=None)
    box.versions.soaks = False
    assert (await run_until(box, job)).state == "rolled_back"
    await tidied(box)
    assert box.registry.resolve("tiny:2").files[0].path.read_bytes() == content
    assert meant(box) == "1"


async def test_a_hostile_model_never_reaches_native_code(box: UpdatingBox, releases: Releases) -> None:
    report = await run_until(box, releases.add(b"GGUF" + b"\xff" * 5000))
    assert (report.state, report.code) == ("failed", "bad_model_file")
    assert box.versions.tests == []
    nothing_changed(box)


async def test_a_piece_list_that_contradicts_the_file_ends_the_update(
    box: UpdatingBox, releases: Releases, tmp_path: Path
) -> None:
    content = tiny_model(tmp_path / "new.gguf")
    job = releases.add(content)
    (old,) = releases.releases[job.target].files
    other = bytes([content[0] ^ 1]) + content[1:]
    releases.lists[old.digest] = piece_list(other).hashes
    (releases.folder / f"sha256-{old.digest}").write_bytes(other)
    report = await run_until(box, job)
    assert (report.state, report.code) == ("failed", "wrong_hash")
    nothing_changed(box)


CANCELED_IN = ("seen", "verified", "reserved", "fetching", "fetched", "staged", "testing", "trial")


@pytest.mark.parametrize("state", CANCELED_IN)
async def test_a_cancel_in_every_state_leaves_what_was_there(
    box: UpdatingBox, releases: Releases, job: Job, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each side effect is stopped on its way, in the state in which it is due."""
    effects = ("verify", "reserve", "begin_fetch", "fetch", "stage", "begin_test", "test", "settle")
    held = dict(zip(CANCELED_IN, effects, strict=True))[state]
    perform, reached = box.steps.perform, asyncio.Event()

    async def hold(effect: Effect, entry: Entry) -> Event:
        if effect == held:
            reached.set()
            await asyncio.Event().wait()
        return await perform(effect, entry)

    monkeypatch.setattr(box.steps, "perform", hold)
    await box.updates.take(sealed(job))

    async def cancel() -> None:
        await reached.wait()
        assert meant(box) == ("2" if state == "trial" else "1")
        assert await box.updates.take(sealed(Job(DEVICE, "stop", 9, "cancel")))

    async with asyncio.TaskGroup() as group:
        group.create_task(cancel())
        report = await box.until("canceled", "confirmed", "failed", job=job.id)
    assert (report.state, report.code) == ("canceled", "canceled")
    assert box.states("stop") == ["canceled"]
    await tidied(box)
    nothing_changed(box)
    assert box.journal.rolled_back(releases.releases[job.target].files[0].digest) is None, (
        "a cancel says nothing against it"
    )


async def test_of_two_jobs_the_newer_wins_and_the_older_is_reported_canceled(
    box: UpdatingBox, job: Job, releases: Releases, tmp_path: Path
) -> None:
    newer = releases.add(tiny_model(tmp_path / "newer.gguf", seed=2), version="3", counter=3)
    assert await box.updates.take(sealed(job))
    assert await box.updates.take(sealed(newer))
    assert not await box.updates.take(sealed(job))
    assert (await box.until("confirmed", "failed", job=newer.id)).state == "confirmed"
    older = [each for each in box.reports() if each.job == job.id][-1]
    assert (older.state, older.code) == ("canceled", "superseded")
    assert meant(box) == "3"


@pytest.mark.parametrize("newer_first", [False, True])
async def test_two_jobs_that_race_end_with_the_newer_whichever_comes_first(
    box: UpdatingBox, job: Job, releases: Releases, tmp_path: Path, newer_first: bool
) -> None:
    newer = releases.add(tiny_model(tmp_path / "newer.gguf", seed=2), version="3", counter=3)
    racing = [newer, job] if newer_first else [job, newer]
    taken = await asyncio.gather(*(box.updates.take(sealed(each)) for each in racing))
    assert taken == ([True, False] if newer_first else [True, True])
    assert (await box.until("confirmed", "failed", job=newer.id)).state == "confirmed"
    await tidied(box)
    assert meant(box) == "3"
    assert [each.full_name for each in box.registry.list()] == ["tiny:1", "tiny:3"]
    assert box.states(job.id)[-1:] == ([] if newer_first else ["canceled"])
    assert (box.journal.floor(MODEL), box.journal.newest()) == (3, 3)


async def test_a_recall_goes_back_to_the_version_before(box: UpdatingBox, job: Job) -> None:
    assert (await run_until(box, job)).state == "confirmed"
    report = await run_until(box, again(job, 3, action="recall"))
    assert (report.state, report.code) == ("rolled_back", "recalled")
    assert meant(box) == "1"
    report = await run_until(box, again(job, 4, action="recall"))
    assert (report.state, report.code) == ("rejected", "nothing_to_recall")


async def test_a_hub_that_is_away_is_asked_again_until_the_job_expires(
    box: UpdatingBox, releases: Releases, job: Job
) -> None:
    in_time = again(job, 3, expires=time.time() + 1.0)
    assert await box.updates.take(sealed(in_time))
    releases.away = True
    with pytest.raises(UnavailableError):
        await box.updates.take(sealed(again(job, 4)))
    report = await box.until("failed", "rejected", "confirmed")
    assert (report.state, report.code) == ("failed", "expired")
    assert "unavailable" in report.detail
    nothing_changed(box)


async def test_nothing_is_fetched_before_the_window_opens(box: UpdatingBox, job: Job) -> None:
    opens = time.time() + 0.7
    report = await run_until(box, again(job, 3, not_before=opens))
    assert report.state == "confirmed"
    fetching = next(each for each in box.reports() if each.state == "fetching")
    assert fetching.at >= opens


async def test_reports_are_sent_one_by_one_until_the_hub_has_them(tmp_path: Path, releases: Releases, job: Job) -> None:
    link = KeptLink()
    opened = UpdatingBox(tmp_path / "data", link, releases, folders=[releases.folder])
    await opened.updates.take(sealed(job))

    def sent() -> list[JobReport]:
        return [msgspec.json.decode(each.payload, type=JobReport) for each in link.sent if "/job/" in each.topic]

    async def acknowledge() -> None:
        acknowledged = 0
        while not (sent() and sent()[-1].state == "confirmed"):
            if len(sent()) > acknowledged:
                acknowledged = len(sent())
                opened.updates.acknowledged(sent()[-1].sequence)
            await asyncio.sleep(0.005)
        assert opened.journal.oldest_report() is not None
        opened.updates.acknowledged(sent()[-1].sequence)
        while opened.journal.oldest_report() is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        running = group.create_task(opened.updates.run())
        await group.create_task(acknowledge())
        running.cancel()
    sequences = [each.sequence for each in sent()]
    assert sequences == sorted(set(sequences)), "each once, in order"
    assert [each.state for each in sent()][-2:] == ["trial", "confirmed"]
    opened.close()


async def test_an_unacknowledged_report_is_sent_again_in_the_next_session_and_holds_back_the_next(
    tmp_path: Path, releases: Releases, job: Job
) -> None:
    link = KeptLink()
    opened = UpdatingBox(tmp_path / "data", link, releases, folders=[releases.folder])
    await opened.updates.take(sealed(job))
    await opened.until("confirmed")
    reports = [each for each in link.sent if "/job/" in each.topic]
    assert len(reports) == 1
    await opened.updates.connected()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        running = group.create_task(opened.updates.run())
        while len([each for each in link.sent if "/job/" in each.topic]) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        running.cancel()
    assert [each.payload for each in link.sent if "/job/" in each.topic] == [reports[0].payload] * 2
    opened.close()


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize("spoil", [flipped, torn, emptied, lengthened])
async def test_a_file_that_rots_before_it_is_staged_is_fetched_again(
    box: UpdatingBox, job: Job, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]
) -> None:
    perform = box.steps.perform
    rotten: list[Path] = []

    async def rot(effect: Effect, entry: Entry) -> Event:
        if effect == "stage" and not rotten:
            (path,) = box.blobs.partial_folder.glob("sha256-" + "[0-9a-f]" * 64)
            spoil(path)
            assert meant(box) == "1"
            rotten.append(path)
        return await perform(effect, entry)

    monkeypatch.setattr(box.steps, "perform", rot)
    assert (await run_until(box, job)).state == "confirmed"
    assert {each.code for each in box.reports() if each.code} == {"damaged"}


async def test_a_journal_that_is_lost_costs_no_byte_that_was_fetched(
    tmp_path: Path, releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tiny_model(tmp_path / "new.gguf", embedding=192)
    job = releases.add(content)
    first = UpdatingBox(tmp_path / "data", KeptLink(), releases, folders=[releases.folder])

    async def hang(_: Entry) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(first.steps, "_stage", hang)
    await first.updates.take(sealed(job))
    await first.until("fetched")
    first.close()
    for each in (tmp_path / "data").glob("fleet.db*"):
        each.unlink()
    (releases.folder / f"sha256-{piece_list(content).digest}").unlink()  # nowhere else to be had
    second = UpdatingBox(tmp_path / "data", KeptLink(), releases, folders=[releases.folder])
    assert (await run_until(second, job)).state == "confirmed"
    second.close()
