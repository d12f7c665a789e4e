"""The part of the agent that imports releases from folders which people bring, hub or no hub.

    a request   its folder's metadata is verified as the hub's is ─▶ what the journal needs of it is kept ─▶ a local job
    the job     goes its way as the hub's do; its files come from the folder alone
    the answer  is written anew whenever the job has moved, until it is on trial or over

It keeps nothing itself: a request whose job is in the journal is only told of, so a kill costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import (
    ApplianceError,
    ConflictError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
)
from appliance.core.fleet import DownKind, Job
from appliance.core.messaging import Message
from appliance.core.releases import Release
from appliance.core.wishes import ModelVersions
from appliance.fleet.import_desk import ImportAnswer, ImportDesk, ImportRequest, from_folder
from appliance.fleet.journal import Entry, Journal
from appliance.fleet.pieces import from_bitmap
from appliance.fleet.trust import Trust

LOGGER = logging.getLogger("appliance.fleet")

LOOK_S = 1.0
_HERE = frozenset({"fetched", "staged", "testing", "trial", "confirmed"})

TrustOf = Callable[[Path], Trust]
"""Verifies the copy of the signed repository in a folder against this box's record."""


class Installing(Protocol):
    """What installs releases."""

    async def install(self, job: Job) -> None:
        """Take on a job of this box itself.

        Raises:
            ConflictError: Another one is on trial.
        """
        ...


class Imports:
    """Reads no topic: its requests lie on the desk."""

    def __init__(
        self,
        desk: ImportDesk,
        journal: Journal,
        *,
        installing: Installing,
        trust_of: TrustOf,
        versions: ModelVersions,
        clock: Clock,
        job_time: Callable[[], float] | None = None,
        look_s: float = LOOK_S,
    ) -> None:
        """Take what the work needs.

        Args:
            desk: Where requests come and answers go.
            journal: Where the jobs are.
            installing: Takes jobs on.
            trust_of: Verifies a folder.
            versions: The model wishes.
            clock: For deadlines.
            job_time: The time by which jobs expire, if that is not the clock's.
            look_s: How often the desk is looked at.
        """
        self._desk = desk
        self._journal = journal
        self._installing = installing
        self._trust_of = trust_of
        self._versions = versions
        self._clock = clock
        self._job_time = job_time or clock.unix
        self._look_s = look_s
        self._told: dict[str, ImportAnswer] = {}

    @property
    def kinds(self) -> frozenset[DownKind]:
        """Return the topics it reads: none."""
        return frozenset()

    async def handle(self, kind: DownKind, message: Message) -> None:
        """Take no message."""

    async def connected(self) -> None:
        """Say nothing: the hub learns from the reported twin what this box has."""

    async def run(self) -> None:
        """Look at the desk until cancelled, connected or not."""
        await asyncio.to_thread(self._desk.tidy, self._clock.unix())
        while True:
            for name in await asyncio.to_thread(self._desk.requests):
                await self._look(name)
            await asyncio.sleep(self._look_s)

    async def _look(self, name: str) -> None:
        try:
            answer = await self._answer(name)
        except ApplianceError as error:
            LOGGER.warning("an import was refused: %s", error)
            answer = ImportAnswer(over=True, code=error.code, detail=error.message, advice=error.advice or "")
        if self._told.get(name) != answer:
            await asyncio.to_thread(self._desk.reply, name, answer)
            self._told[name] = answer
        if answer.over:
            self._told.pop(name, None)

    async def _answer(self, name: str) -> ImportAnswer:
        entry = self._journal.local(_job_id(name))
        if entry is None:
            done = await self._begin(name)
            entry = self._journal.local(_job_id(name))
            if done is not None or entry is None:
                return done or ImportAnswer()
        return _progress(entry, self._percent(entry))

    async def _begin(self, name: str) -> ImportAnswer | None:
        """Verify what was brought and take it on; return an answer if there is nothing to do."""
        request = await asyncio.to_thread(self._desk.request, name)
        if request is None:  # torn, or taken back this moment
            raise InvalidRequestError(f"The request {name} to import a folder cannot be read.")
        if request.expires <= self._clock.unix():
            raise DeadlineExceededError(
                f"The time to import {request.folder} was over before this server looked.",
                advice="Repeat the command.",
            )
        folder = Path(request.folder)
        trust = self._trust_of(folder)
        await self._verified(trust, folder)
        job = chosen(await trust.offered(), request)
        release = await _kept(trust, job)
        wish = self._versions.wish(release.model)
        if wish is not None and wish.meant == release.version and wish.state == "confirmed":
            detail = f"{release.model}:{release.version} is what this box runs already."
            return ImportAnswer("confirmed", True, True, release.model, release.version, 100, "", detail)
        expires = request.expires - self._clock.unix() + self._job_time()
        job = msgspec.structs.replace(job, id=_job_id(name), expires=expires, force=request.force)
        await self._installing.install(from_folder(job, folder))
        return None

    async def _verified(self, trust: Trust, folder: Path) -> None:
        """Look at the folder itself: what was recorded before must not stand in for one that is gone or old."""
        if not await asyncio.to_thread((folder / "metadata").is_dir):
            raise NotFoundError(
                f"{folder} has no signed repository that this server can see.",
                advice="Is the stick still there, and may the server's user read it? `appliance hub releases export "
                "FOLDER` makes one.",
            )
        await trust.refresh()

    def _percent(self, entry: Entry) -> int:
        if entry.update.state in _HERE:
            return 100
        lists = self._journal.piece_lists(entry.update.version)
        total = sum(each.count for each in lists)
        safe = sum(len(from_bitmap(self._journal.safe(each.digest), each.count)) for each in lists)
        return 100 * safe // total if total else 0


def chosen(jobs: Sequence[Job], request: ImportRequest) -> Job:
    """Return the job that installs the model which is wanted.

    Raises:
        NotFoundError: The folder does not have it.
        ConflictError: It has several, and none was named.
    """
    offered = {each.target.split("/")[1]: each for each in jobs}
    names = ", ".join(sorted(offered))
    if not offered:
        raise NotFoundError(f"The signed repository in {request.folder} has no release.", code="not_released")
    if request.model is None and len(offered) > 1:
        raise ConflictError(
            f"{request.folder} has releases of several models: {names}.", advice="Name one with --model."
        )
    job = offered.get(request.model or names)
    if job is None:
        raise NotFoundError(
            f"{request.folder} has no release of {request.model}.", advice=f"It has: {names}.", code="not_released"
        )
    return job


async def _kept(trust: Trust, job: Job) -> Release:
    """Verify all that the journal will ask for; it is in the record then, so that nobody has to be asked again."""
    release = await trust.verified_release(job)
    for file in release.files:
        await trust.piece_list(release, file)
    return release


def _progress(entry: Entry, percent: int) -> ImportAnswer:
    update, release = entry.update, entry.release
    installed = update.state == "confirmed" or (update.state == "trial" and update.soaking and update.ending is None)
    return ImportAnswer(
        update.state,
        update.over or installed,
        installed,
        "" if release is None else release.model,
        "" if release is None else release.version,
        percent,
        update.code,
        update.detail,
    )


def _job_id(name: str) -> str:
    return f"import-{name}"
