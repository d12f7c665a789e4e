"""A box that takes updates, for the tests: a real registry, journal and wishes, and a hub's signed releases at hand.

What `serving` does with a wish, and the signed repository, have tests of their own; here they do as they are told.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from appliance.core.clock import Clock, SystemClock
from appliance.core.errors import UnavailableError, UntrustedError
from appliance.core.fleet import PIECE_BYTES, Answer, Job, JobReport, Question
from appliance.core.messaging import Link
from appliance.core.releases import JOB_TYPE, Criteria, Release, ReleaseFile, release_target
from appliance.core.wishes import REQUESTED, SelfTestReport, Soak, Wish
from appliance.fleet.hub_source import HubBlocks
from appliance.fleet.journal import Journal
from appliance.fleet.pieces import PieceList, hashes_of
from appliance.fleet.schema import open_fleet_database
from appliance.fleet.sources import Context
from appliance.fleet.staging import Box, Staging
from appliance.fleet.update_steps import Steps
from appliance.fleet.updates import Updates
from appliance.registry.blobs import Blobs
from appliance.registry.versions import Registry
from appliance.registry.wishes import Wishes
from appliance.security.envelopes import open_envelope, seal
from appliance.security.signing import SigningKey, make_key
from appliance.store.database import Database
from tests.tiny_gguf import write_tiny_llama

DEVICE = "box-1"
MODEL = "tiny"
DIRECTOR = make_key()


def piece_list(content: bytes) -> PieceList:
    chunks = [content[at : at + PIECE_BYTES] for at in range(0, len(content), PIECE_BYTES)]
    return PieceList(hashlib.sha256(content).hexdigest(), len(content), hashes_of(chunks))


@dataclass
class Releases:
    """The signed repository, as `fleet.trust` tells of it.

    Attributes:
        folder: Where the hub has the files of the releases.
        key: Signs jobs.
        away: Whether the hub can be asked.
    """

    folder: Path
    key: SigningKey = DIRECTOR
    away: bool = False
    releases: dict[str, Release] = field(default_factory=dict)
    lists: dict[str, bytes] = field(default_factory=dict)

    def add(self, content: bytes, *, version: str = "2", counter: int = 2, model: str = MODEL, **more: object) -> Job:
        """Release a model of one file and return a job that installs it."""
        pieces = piece_list(content)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"sha256-{pieces.digest}").write_bytes(content)
        values = {"kind": "gguf", "task": "chat", "licence": "MIT", **more}
        files = (ReleaseFile("model", len(content), pieces.digest),)
        release = Release(model=model, version=version, counter=counter, files=files, **values)  # type: ignore[arg-type]
        target = release_target(model, counter)
        self.releases[target] = release
        self.lists[pieces.digest] = pieces.hashes
        return Job(DEVICE, f"job-{counter}", counter, "install", target, counter=counter)

    async def open_job(self, data: bytes) -> Job:
        if self.away:
            raise UnavailableError("The hub is away.")
        return msgspec.json.decode(open_envelope(data, JOB_TYPE, [self.key.public]), type=Job)

    async def verified_release(self, job: Job) -> Release:
        if self.away:
            raise UnavailableError("The hub is away.")
        if job.target not in self.releases:
            raise UntrustedError(f"{job.target} is not signed.", code="not_released")
        return self.releases[job.target]

    async def piece_list(self, release: Release, file: ReleaseFile) -> Sequence[bytes]:
        if self.away:
            raise UnavailableError("The hub is away.")
        hashes = self.lists[file.digest]
        return [hashes[at : at + 32] for at in range(0, len(hashes), 32)]


def sealed(job: Job, key: SigningKey = DIRECTOR) -> bytes:
    return seal(msgspec.json.encode(job), JOB_TYPE, [key])


class Tried:
    """The wishes of the box, with a self-test and a soak that end as they are told.

    Attributes:
        passes: The outcome of the self-test.
        soaks: The outcome of the trial; None lets it go on.
        tests: Full names that were tested.
    """

    def __init__(self, wishes: Wishes) -> None:
        self.kept = wishes
        self.passes = SelfTestReport(True)
        self.soaks: bool | None = True
        self.tests: list[str] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.testing = asyncio.Event()
        self.changed = asyncio.Event()

    def wishes(self) -> Sequence[Wish]:
        return list(self.kept.all().values())

    def wish(self, name: str) -> Wish | None:
        return self.kept.find(name)

    async def test(self, full_name: str, criteria: Criteria) -> SelfTestReport:
        self.kept.registered(full_name)
        self.tests.append(full_name)
        self.testing.set()
        await self.hold.wait()
        return self.passes

    async def activate(self, full_name: str, *, origin: str, soak: Soak | None, criteria: Criteria) -> Wish:
        return self.kept.activate(full_name, origin=origin, soak=soak, criteria=criteria)

    async def rollback(self, name: str, *, origin: str, reason: str, code: str = REQUESTED) -> Wish:
        wish = self.kept.roll_back(name, origin=origin, reason=reason, code=code)
        self.changed.set()
        return wish

    async def settled(self, name: str) -> Wish:
        while True:
            wish = self.kept.find(name)
            assert wish is not None
            if wish.state != "trial":
                return wish
            if self.soaks is None:
                self.changed.clear()
                await self.changed.wait()
            elif self.soaks:
                self.kept.confirm(name, wish.version)
            else:
                self.kept.roll_back(name, code="soak_errors", reason="3 of 10 requests failed")


class NoQuestions:
    """A hub that answers nothing."""

    async def ask(self, question: Question, *, timeout_s: float = 10.0) -> Answer:
        raise UnavailableError("nobody answers")


class UpdatingBox:
    """The device's side, built as `compose` builds it."""

    def __init__(
        self,
        folder: Path,
        link: Link,
        releases: Releases,
        *,
        clock: Clock | None = None,
        folders: Sequence[Path] = (),
        box: Box = Box("generic", "1.0", 0),  # noqa: B008  (it is frozen)
        bytes_per_s: Callable[[], int] = lambda: 0,
        context: Context | None = None,
    ) -> None:
        self.clock = clock or SystemClock()
        self.folder = folder
        self.databases = [Database(folder / "appliance.db"), open_fleet_database(folder / "fleet.db")]
        self.blobs = Blobs(folder / "models" / "blobs")
        self.registry = Registry(self.databases[0], self.blobs)
        self.versions = Tried(Wishes(self.databases[0], self.registry))
        self.journal = Journal(self.databases[1], self.clock)
        self.hub = HubBlocks(DEVICE, link, self.clock, bytes_per_s)

        async def this_box() -> Box:
            return box

        self.steps = Steps(
            self.journal,
            releases=releases,
            staging=Staging(self.registry),
            versions=self.versions,
            hub=self.hub,
            blobs=self.blobs,
            box=this_box,
            folders=lambda: folders,
            clock=self.clock,
            context=context,
        )
        self.updates = Updates(
            DEVICE,
            link,
            self.journal,
            self.steps,
            hub=self.hub,
            releases=releases,
            asking=NoQuestions(),
            clock=self.clock,
        )

    def close(self) -> None:
        for each in self.databases:
            each.close()

    def reports(self) -> list[JobReport]:
        """Return the reports that were not acknowledged."""
        rows = self.databases[1].read(
            lambda connection: connection.execute("SELECT report FROM update_reports ORDER BY sequence").fetchall()
        )
        return [msgspec.json.decode(row["report"], type=JobReport) for row in rows]

    def states(self, job: str) -> list[str]:
        """Return what was reported of a job, without the percentages."""
        found: list[str] = []
        for each in self.reports():
            if each.job == job and (not found or found[-1] != each.state):
                found.append(each.state)
        return found

    async def until(self, *states: str, job: str | None = None, timeout_s: float = 30.0) -> JobReport:
        """Work until a job is reported to be in one of the states, and return that report."""
        async with asyncio.timeout(timeout_s):
            running = asyncio.get_running_loop().create_task(self.updates.run())
            try:
                while True:
                    for each in self.reports():
                        if each.state in states and job in (None, each.job):
                            return each
                    assert not running.done(), running.exception()
                    await asyncio.sleep(0.01)
            finally:
                running.cancel()
                with suppress(asyncio.CancelledError):
                    await running


def tiny_model(path: Path, seed: int = 1, *, embedding: int = 32) -> bytes:
    """Return a sound GGUF file; of 192 wide it has several pieces."""
    return write_tiny_llama(path, seed=seed, embedding=embedding).read_bytes()
