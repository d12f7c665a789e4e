"""Releases on a stick: a real export of a real repository, a real registry and journal, and no hub to be reached."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from appliance.cli import fleet_import
from appliance.cli.fleet import command as fleet_command
from appliance.core.errors import ConflictError, UnavailableError
from appliance.core.fleet import Answer, Job, Question
from appliance.core.releases import Release, ReleaseFile
from appliance.core.settings import Settings, load_settings
from appliance.fleet.identity import HubAddress
from appliance.fleet.import_desk import ImportAnswer, ImportDesk, ImportRequest
from appliance.fleet.imports import Imports
from appliance.fleet.journal import Entry
from appliance.fleet.signed_files import FolderAsking
from appliance.fleet.trust import Trust
from appliance.fleet.trust_record import TrustRecord
from appliance.fleet.update_machine import Effect, Event
from appliance.hub.export import export_releases
from appliance.hub.release_blobs import ReleaseBlobs
from appliance.hub.release_records import SignedRelease
from appliance.registry.install import import_model
from appliance.store.ownership import own
from tests.fleet.links import KeptLink, until
from tests.fleet.trusting import DAY, START, HandClock, Hub, changed
from tests.fleet.updating import DEVICE, MODEL, UpdatingBox, tiny_model

pytestmark = pytest.mark.anyio


class Signed:
    """What the hub's repository says, once the box's database is there."""

    trust: Trust

    async def open_job(self, data: bytes) -> Job:
        return await self.trust.open_job(data)

    async def verified_release(self, job: Job) -> Release:
        return await self.trust.verified_release(job)

    async def piece_list(self, release: Release, file: ReleaseFile) -> Sequence[bytes]:
        return await self.trust.piece_list(release, file)


class Unreadable(FolderAsking):
    """A stick whose files do not come."""

    async def ask(self, question: Question, *, timeout_s: float = 10.0) -> Answer:
        raise UnavailableError(f"{question.path} did not come.", code="hub_slow")


class Site:
    """A closed site: a box that was enrolled once, and an operator who comes from the hub with a stick."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hub = Hub(folder / "hub", HandClock())
        self.hub.silent = True
        self.blobs = ReleaseBlobs(folder / "hub-blobs")
        self.desk = ImportDesk(folder / "data" / "fleet" / "imports")
        self.asking: type[FolderAsking] = FolderAsking
        self._open()

    def _open(self) -> None:
        signed = Signed()
        self.box = UpdatingBox(self.folder / "data", KeptLink(), signed)  # type: ignore[arg-type]
        record = TrustRecord(self.box.databases[1])
        floor = self.box.journal.floor
        signed.trust = Trust(DEVICE, record, self.hub, release_floor=floor, built=START - DAY)
        self.record = record
        self.imports = Imports(
            self.desk,
            self.box.journal,
            installing=self.box.updates,
            trust_of=lambda stick: Trust(DEVICE, record, self.asking(stick), release_floor=floor, built=START - DAY),
            versions=self.box.versions,
            clock=self.box.clock,
            look_s=0.01,
        )

    def restart(self) -> None:
        self.box.close()
        self._open()

    def release(self, seed: int, *, model: str = MODEL, **fields: object) -> SignedRelease:
        """Sign random weights of several pieces as the next release of a model, as `hub releases add` does."""
        path = self.folder / f"{model}-{seed}.gguf"
        content = tiny_model(path, seed=seed, embedding=192)
        self.blobs.store(path, None)
        release = self.hub.release(model, content, **fields)
        job = self.hub.job(release)
        return SignedRelease(release, job.target, job.length, job.digest)

    def export(self, name: str, *releases: SignedRelease) -> Path:
        stick = self.folder / name
        export_releases(self.hub.authority, self.blobs, releases, stick)
        return stick

    def ask(self, stick: Path, **more: object) -> str:
        wanted = {"expires": time.time() + 60, **more}
        return self.desk.hand_in(ImportRequest(str(stick), **wanted))  # type: ignore[arg-type]

    async def followed(self, name: str, state: str = "over") -> ImportAnswer:
        """Let the box work until a request is over, or is in a state."""
        loop = asyncio.get_running_loop()
        work = [loop.create_task(self.box.updates.run()), loop.create_task(self.imports.run())]
        try:
            await until(lambda: self._is_at(name, state) or any(each.done() for each in work))
            answer = self.desk.answer(name)
            assert answer is not None, [each.exception() for each in work]
            return answer
        finally:
            for each in work:
                each.cancel()
            for each in work:
                with suppress(asyncio.CancelledError):
                    await each

    def _is_at(self, name: str, state: str) -> bool:
        answer = self.desk.answer(name)
        if answer is None or not answer.over:
            return answer is not None and answer.state == state
        return name not in self.desk.requests()  # the answer comes first

    async def imported(self, stick: Path, **more: object) -> ImportAnswer:
        return await self.followed(self.ask(stick, **more))

    async def settled(self) -> None:
        """Let the box work until no job is open."""
        work = asyncio.get_running_loop().create_task(self.box.updates.run())
        await until(lambda: self.box.journal.current() is None)
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work

    def meant(self) -> str:
        return self.box.registry.resolve(MODEL).version

    def nothing_changed(self) -> None:
        assert self.meant() == "1"
        assert [each.full_name for each in self.box.registry.list()] == ["tiny:1"]
        assert list(self.box.blobs.partial_folder.iterdir()) == []
        assert self.box.journal.current() is None
        assert self.box.journal.floor(MODEL) == 0


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    await site.record.anchor(site.hub.authority.root())
    tiny_model(tmp_path / "old.gguf", seed=0)
    import_model(tmp_path / "old.gguf", site.box.registry, name=MODEL, version="1")
    yield site
    site.box.close()


async def test_a_release_on_a_stick_is_installed_without_any_hub(site: Site) -> None:
    stick = site.export("stick", site.release(2))
    answer = await site.imported(stick)
    assert answer == ImportAnswer(answer.state, True, True, MODEL, "v1", 100)
    assert answer.state in ("trial", "confirmed")
    await site.settled()
    assert site.meant() == "v1"
    assert site.box.versions.tests == ["tiny:v1"]
    assert site.box.journal.floor(MODEL) == 1
    assert site.hub.asked == [], "the hub was not to be reached"
    assert site.desk.requests() == []
    assert site.box.reports() == [], "the hub knows nothing of this job"


async def test_what_runs_already_is_said_and_not_tried_again(site: Site) -> None:
    stick = site.export("stick", site.release(2))
    await site.imported(stick)
    await site.settled()
    answer = await site.imported(stick)
    assert (answer.state, answer.installed) == ("confirmed", True)
    assert "already" in answer.detail
    assert site.box.versions.tests == ["tiny:v1"]


async def test_an_older_stick_is_refused_and_the_newer_release_runs_on(site: Site) -> None:
    older = site.export("older", site.release(2))
    newer = site.export("newer", site.release(3))
    await site.imported(newer)
    await site.settled()
    answer = await site.imported(older)
    assert (answer.installed, answer.code) == (False, "metadata_old")
    assert site.meant() == "v2"
    assert site.box.journal.floor(MODEL) == 2


async def test_metadata_that_was_tampered_with_is_refused(site: Site) -> None:
    stick = site.export("stick", site.release(2))
    for path in (stick / "metadata").glob("*targets.json"):
        path.write_bytes(changed(path.read_bytes(), lambda document: document["signed"].update(version=9)))
    answer = await site.imported(stick)
    assert (answer.installed, answer.state) == (False, "")
    assert answer.code in ("bad_signature", "wrong_content", "not_trusted", "bad_metadata")
    site.nothing_changed()


async def test_a_release_document_that_was_tampered_with_is_refused(site: Site) -> None:
    stick = site.export("stick", site.release(2))
    path = next((stick / "targets").rglob("*release.json"))
    path.write_bytes(path.read_bytes().replace(b'"Apache-2.0"', b'"Apache-3.0"'))
    answer = await site.imported(stick)
    assert (answer.installed, answer.code) == (False, "wrong_content")
    site.nothing_changed()


async def test_a_model_file_that_was_tampered_with_is_refused(site: Site) -> None:
    release = site.release(2)
    stick = site.export("stick", release)
    path = stick / f"sha256-{release.release.files[0].digest}"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    answer = await site.imported(stick)
    assert (answer.state, answer.code) == ("failed", "gone")
    assert "1 of" in answer.detail
    site.nothing_changed()


async def test_a_file_that_is_missing_on_the_stick_is_said_at_once(site: Site) -> None:
    release = site.release(2)
    stick = site.export("stick", release)
    (stick / f"sha256-{release.release.files[0].digest}").unlink()
    answer = await site.imported(stick)
    assert (answer.state, answer.code) == ("failed", "gone")
    assert str(stick) in answer.detail
    site.nothing_changed()


@pytest.mark.parametrize("missing", ["metadata", "metadata/timestamp.json", "targets"])
async def test_a_folder_without_the_signed_repository_is_refused(site: Site, missing: str) -> None:
    stick = site.export("stick", site.release(2))
    path = stick / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    answer = await site.imported(stick)
    assert not answer.installed
    assert answer.code in ("not_found", "metadata_missing", "target_missing")
    assert answer.detail
    site.nothing_changed()


async def test_a_stick_that_is_pulled_out_in_the_middle_costs_nothing_and_comes_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    stick = site.export("stick", site.release(2))
    perform = site.box.steps.perform

    async def pulling(effect: Effect, entry: Entry) -> Event:
        if effect == "fetch":
            stick.rename(site.folder / "pocket")
        return await perform(effect, entry)

    monkeypatch.setattr(site.box.steps, "perform", pulling)
    answer = await site.imported(stick)
    assert (answer.state, answer.code) == ("failed", "gone")
    site.nothing_changed()
    monkeypatch.undo()
    (site.folder / "pocket").rename(stick)
    assert (await site.imported(stick)).installed


async def test_a_release_for_other_hardware_is_rejected(site: Site) -> None:
    stick = site.export("stick", site.release(2, hardware=("jetson",)))
    answer = await site.imported(stick)
    assert (answer.state, answer.code) == ("rejected", "incompatible")
    site.nothing_changed()


async def test_a_repository_that_others_signed_is_refused(site: Site, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    stranger = Site(tmp_path / "elsewhere")
    try:
        answer = await site.imported(stranger.export("stick", stranger.release(2)))
    finally:
        stranger.box.close()
    assert (answer.installed, answer.state) == (False, "")
    site.nothing_changed()


async def test_of_several_models_one_has_to_be_named(site: Site) -> None:
    stick = site.export("stick", site.release(2), site.release(3, model="other"))
    answer = await site.imported(stick)
    assert (answer.installed, answer.code) == (False, "conflict")
    assert "other, tiny" in answer.detail
    assert (await site.imported(stick, model="absent")).code == "not_released"
    assert (await site.imported(stick, model=MODEL)).installed


async def test_an_import_that_a_kill_broke_off_goes_on_at_the_next_start(site: Site) -> None:
    stick = site.export("stick", site.release(2))
    site.box.versions.hold.clear()
    name = site.ask(stick)
    answer = await site.followed(name, "testing")
    assert (answer.state, answer.over) == ("testing", False)
    site.restart()
    assert (await site.followed(name)).installed
    assert len(site.box.versions.tests) == 1


async def test_a_failed_trial_is_not_repeated_unless_a_person_insists(site: Site) -> None:
    stick = site.export("stick", site.release(2))
    site.box.versions.soaks = False
    await site.imported(stick)
    await site.settled()
    assert site.meant() == "1"
    answer = await site.imported(stick)
    assert (answer.state, answer.code) == ("rejected", "rolled_back_before")
    site.box.versions.soaks = True
    assert (await site.imported(stick, force=True)).installed


async def test_the_hubs_jobs_keep_their_numbers_and_supersede_an_import(site: Site) -> None:
    release = site.release(2)
    stick = site.export("stick", release)
    site.box.versions.hold.clear()
    name = site.ask(stick)
    await site.followed(name, "testing")
    assert site.box.journal.newest() == 0
    assert await site.box.journal.take(site.hub.job(release.release))
    site.box.versions.hold.set()
    answer = await site.followed(name)
    assert (answer.state, answer.code) == ("canceled", "superseded")
    assert [each.version for each in site.box.reports()][:1] == [1]


async def test_an_import_supersedes_what_the_hub_wants_but_no_trial(site: Site) -> None:
    release = site.release(2)
    stick = site.export("stick", release)
    job = site.hub.job(release.release)
    assert await site.box.journal.take(job)  # the hub is away, so it cannot even be verified
    assert (await site.imported(stick)).installed
    assert "canceled" in site.box.states(job.id)
    await site.settled()
    newer = site.export("newer", site.release(3))
    site.box.versions.soaks = None
    assert (await site.imported(newer)).state == "trial"
    newest = site.export("newest", site.release(4))
    answer = await site.imported(newest)
    assert (answer.installed, answer.code) == (False, "update_on_trial")
    with pytest.raises(ConflictError):
        await site.box.journal.take_local(job)


async def test_what_a_hubs_job_began_is_undone_before_an_import_begins(site: Site) -> None:
    job = site.hub.job(site.release(2).release, version=7)
    assert await site.box.journal.take(job)
    await site.box.journal.take_local(msgspec.structs.replace(job, id="import-1", version=0))
    first = site.box.journal.current()
    assert first is not None
    assert (first.update.version, first.update.ending) == (7, "canceled")
    assert site.box.journal.local(job.id) is None
    assert site.box.journal.newest() == 7


async def test_a_folder_that_cannot_be_read_is_not_answered_out_of_the_record(site: Site) -> None:
    stick = site.export("stick", site.release(2))
    await site.imported(stick)
    await site.settled()
    site.asking = Unreadable
    answer = await site.imported(stick)
    assert (answer.installed, answer.code) == (False, "hub_slow")


async def test_a_hub_that_is_broken_does_not_stop_an_import(site: Site) -> None:
    stick = site.export("stick", site.release(2))
    site.hub.silent = False
    site.hub.hide("metadata/")
    assert (await site.imported(stick)).installed
    assert site.hub.asked == []


async def test_a_request_that_is_late_or_torn_is_answered_and_installs_nothing(site: Site) -> None:
    stick = site.export("stick", site.release(2))
    assert (await site.imported(stick, expires=1.0)).code == "deadline_exceeded"
    name = site.ask(stick)
    next(site.desk._folder.glob("*.json")).write_bytes(b"{")
    assert (await site.followed(name)).code == "invalid_request"
    site.nothing_changed()


def test_answers_that_nobody_fetched_are_tidied_away(tmp_path: Path) -> None:
    desk = ImportDesk(tmp_path / "imports")
    name = desk.hand_in(ImportRequest("/stick"))
    desk.reply(name, ImportAnswer(over=True))
    assert desk.requests() == []
    desk.tidy(time.time())
    assert desk.answer(name) is not None
    desk.tidy(time.time() + 90_000)
    assert desk.answer(name) is None


@pytest.fixture
async def served(site: Site) -> AsyncIterator[Settings]:
    """Return the settings of the box, enrolled, with a server that speaks for it."""
    settings, _ = load_settings(flags={"data_dir": site.folder / "data"}, environment={})
    files = {
        "instance": b"0123456789abcdef",
        "authority.pem": b"-",
        "root.json": site.hub.authority.root(),
        "hub.json": msgspec.json.encode(HubAddress(DEVICE, "localhost", 8883)),
        "credentials.pem": b"-",
    }
    settings.fleet_dir.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (settings.fleet_dir / name).write_bytes(content)
    with own(settings.fleet_lock_path, UnavailableError):
        yield settings


async def verb(site: Site, *arguments: object, works: bool = True) -> Result:
    """Run the verb, as a person does, beside the box."""
    command = ["import", *map(str, arguments), "--data", str(site.folder / "data")]
    loop = asyncio.get_running_loop()
    parts = [site.box.updates.run(), site.imports.run()] if works else []
    work = [loop.create_task(each) for each in parts]
    try:
        return await asyncio.to_thread(CliRunner().invoke, fleet_command, command)
    finally:
        for each in work:
            each.cancel()
        await asyncio.gather(*work, return_exceptions=True)


async def test_the_verb_brings_a_release_and_says_what_the_name_means(site: Site, served: Settings) -> None:
    stick = site.export("stick", site.release(2))
    result = await verb(site, stick, "--wait", 30)
    assert result.exit_code == 0, result.output
    assert "tiny means tiny:v1" in result.stdout
    assert list(served.fleet_imports_dir.iterdir()) == []
    await site.settled()
    again = await verb(site, stick, "--json")
    assert json.loads(again.stdout) == {
        "state": "confirmed",
        "model": "tiny",
        "version": "v1",
        "percent": 100,
        "detail": "tiny:v1 is what this box runs already.",
    }


@pytest.mark.usefixtures("served")
async def test_the_verb_says_what_is_wrong_with_a_folder(site: Site) -> None:
    release = site.release(2)
    stick = site.export("stick", release)
    (stick / f"sha256-{release.release.files[0].digest}").unlink()
    result = await verb(site, stick)
    assert result.exit_code != 0
    assert "Nothing was installed" in result.stderr
    assert str(stick) in result.stderr
    (site.folder / "empty").mkdir()
    result = await verb(site, site.folder / "empty", "--json")
    assert result.exit_code != 0
    assert json.loads(result.stdout or result.stderr)["error"]["code"] == "not_found"
    absent = await verb(site, site.folder / "absent")
    assert "is no folder" in absent.stderr
    unnamed = await verb(site, stick, "--model", "No Name")
    assert unnamed.exit_code == 5
    site.nothing_changed()


@pytest.mark.usefixtures("served")
async def test_the_verb_does_not_wait_for_ever(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_import, "GRACE_S", 0.0)
    stick = site.export("stick", site.release(2))
    result = await verb(site, stick, "--wait", 1, works=False)
    assert "not on trial within 1 s" in result.stderr
    assert site.desk.requests() == [], "what nobody waits for any more is not begun"


async def test_the_verb_needs_a_box_that_was_enrolled_once(site: Site) -> None:
    stick = site.export("stick", site.release(2))
    result = await verb(site, stick, works=False)
    assert "is not enrolled" in result.stderr


async def test_the_verb_says_that_no_server_runs_or_that_it_ended(site: Site, served: Settings) -> None:
    stick = site.export("stick", site.release(2))
    asking = asyncio.create_task(verb(site, stick, works=False))
    await until(site.desk.requests)
    served.fleet_lock_path.unlink()
    result = await asking
    assert "The server ended" in result.stderr
    result = await verb(site, stick, works=False)
    assert "appliance serve" in result.stderr
