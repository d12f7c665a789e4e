"""The side effects of an update, one function each. Every one can be repeated: after a crash it is done again."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from appliance.core.clock import Clock
from appliance.core.errors import (
    ApplianceError,
    ConflictError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    SourceError,
    StorageError,
    UnavailableError,
)
from appliance.core.fleet import Job
from appliance.core.releases import Release, ReleaseFile
from appliance.core.wishes import REQUESTED, ModelVersions, Soak, Wish
from appliance.fleet.download import Download, Lies, in_thread, is_reserved, reserve
from appliance.fleet.hub_source import HubBlocks
from appliance.fleet.import_desk import folder_of
from appliance.fleet.journal import PERCENT_STEP, Entry, Journal
from appliance.fleet.pieces import PieceList, from_bitmap
from appliance.fleet.sources import BlobSource, Context, FolderSource, MirrorSource, Source, fetch, in_order
from appliance.fleet.staging import Box, DamagedFileError, Staging, check_suits
from appliance.fleet.update_machine import Damaged, Done, Effect, Event, Refused, RolledBack, Stumbled
from appliance.registry.blobs import Blobs

LOGGER = logging.getLogger("appliance.fleet")

_MAY_PASS = (
    UnavailableError,
    OverloadedError,
    DeadlineExceededError,
    StorageError,
    SourceError,
    ConflictError,
)
_PASSES = frozenset({"metadata_expired", "metadata_old", "target_missing"})
"""Codes of what is not to be believed today, and may be when the hub has signed its metadata anew."""

_STAYS = frozenset({"gone", "model_exists", "schema_newer"})
"""Codes that no waiting changes, whatever their class."""


class Releases(Protocol):
    """What the signed repository says, as far as it can be believed; `fleet.trust` has it."""

    async def open_job(self, data: bytes) -> Job:
        """Return a job that the director signed for this device.

        Raises:
            UntrustedError: It is none, or older than one that was seen.
            UnavailableError: The hub cannot be asked for the director's keys now.
        """
        ...

    async def verified_release(self, job: Job) -> Release:
        """Return the release that a job names.

        Raises:
            UntrustedError: Job and repository do not agree, or a signature, length, hash or counter is wrong.
            UnavailableError: The hub cannot be asked now.
        """
        ...

    async def piece_list(self, release: Release, file: ReleaseFile) -> Sequence[bytes]:
        """Return the signed hash of each piece of a file. Raises as `verified_release`."""
        ...


class Steps:
    """Carries out what is due."""

    def __init__(
        self,
        journal: Journal,
        *,
        releases: Releases,
        staging: Staging,
        versions: ModelVersions,
        hub: HubBlocks,
        blobs: Blobs,
        box: Callable[[], Awaitable[Box]],
        folders: Callable[[], Sequence[Path]],
        clock: Clock,
        context: Context | None = None,
    ) -> None:
        """Take what the steps need.

        Args:
            journal: Where what was verified is kept.
            releases: The signed repository.
            staging: The way into the registry.
            versions: The wishes.
            hub: Blocks over MQTT.
            blobs: Where files are fetched to.
            box: What a release must suit.
            folders: Where pieces may lie, such as a memory stick.
            clock: For the pauses.
            context: For the hub's own files by HTTPS; without it they are asked for like any mirror's.
        """
        self._journal = journal
        self._releases = releases
        self._staging = staging
        self._versions = versions
        self._hub = hub
        self._blobs = blobs
        self._box = box
        self._folders = folders
        self._context = context
        self._clock = clock

    async def perform(self, effect: Effect, entry: Entry) -> Event:
        """Carry out a side effect and return what has become of it."""
        try:
            return await self._perform(effect, entry)
        except DamagedFileError as error:
            return await self._look_for_damage(entry, error)
        except ApplianceError as error:
            LOGGER.warning("%s of the job %s did not work: %s", effect, entry.job.id, error)
            stays = error.code in _STAYS or (entry.is_local and isinstance(error, SourceError))
            may_pass = isinstance(error, _MAY_PASS) and not stays
            if not (may_pass or error.code in _PASSES):
                return Refused(error.code, str(error))
            spread = random.uniform(0.5, 1.0)  # noqa: S311  (it spreads load and keeps no secret)
            return Stumbled(error.code, str(error), self._clock.unix(), spread)

    async def _perform(self, effect: Effect, entry: Entry) -> Event:
        work: Callable[[Entry], Awaitable[Event | None]] | None = {
            "verify": self._verify_recall if entry.update.recall else self._verify,
            "reserve": self._reserve,
            "fetch": self._fetch,
            "stage": self._stage,
            "test": self._test,
            "activate": self._activate,
            "settle": self._settle,
            "roll_back": self._roll_back,
            "discard": self._discard,
        }.get(effect)
        return (await work(entry) if work else None) or Done()

    async def _verify(self, entry: Entry) -> Event:
        release = await self._releases.verified_release(entry.job)
        check_suits(release, await self._box())
        why = self._journal.rolled_back(release.files[0].digest)
        if why is not None and not entry.job.force:
            return Refused("rolled_back_before", f"This model was tried here already and went back: {why}")
        was_present = await in_thread(self._staging.is_present, release)
        lists = [
            PieceList(file.digest, file.length, b"".join(await self._releases.piece_list(release, file)))
            for file in await in_thread(self._staging.lacking, release)
        ]
        await self._journal.verified(entry.update.version, release, lists, was_present=was_present)
        return Done()

    async def _verify_recall(self, entry: Entry) -> Event:
        release = self._journal.release_of(entry.job.target)
        wish = None if release is None else self._versions.wish(release.model)
        if release is None or wish is None or wish.meant != release.version:
            return Refused("nothing_to_recall", f"The release {entry.job.target!r} is not what this box runs.")
        await self._journal.verified(entry.update.version, release, [], was_present=True)
        return Done()

    async def _reserve(self, entry: Entry) -> None:
        lists = [each for each in self._journal.piece_lists(entry.update.version) if not self._has(each)]
        unreserved = [each for each in lists if not await in_thread(is_reserved, self._blobs, each)]
        await in_thread(self._blobs.require_space, sum(each.length for each in unreserved), "fetch an update")
        for each in unreserved:
            await self._journal.commit(each.digest, b"")  # first: what is not there must not count as safe
            await in_thread(reserve, self._blobs, each)

    async def _fetch(self, entry: Entry) -> None:
        lists = self._journal.piece_lists(entry.update.version)
        lies, teller = Lies(), _Teller(self._journal, entry, lists)
        for pieces in lists:
            if not self._has(pieces):
                with self._open(pieces, lies, teller) as download:
                    await fetch(download, self._sources(entry, pieces.length))

    async def _stage(self, entry: Entry) -> None:
        await in_thread(self._staging.stage, _release(entry))

    async def _test(self, entry: Entry) -> Event:
        release = _release(entry)
        report = await self._versions.test(_full_name(release), release.criteria)
        return Done() if report.passed else Refused(report.code or "failed_test", report.detail)

    async def _activate(self, entry: Entry) -> None:
        release = _release(entry)
        wish = self._versions.wish(release.model)
        if wish is not None and wish.version == release.version and wish.state == "trial":
            return  # a crash came between the wish and the journal
        await self._versions.activate(
            _full_name(release),
            origin=_origin(entry),
            soak=Soak(seconds=entry.job.trial_s, requests=entry.job.trial_requests),
            criteria=release.criteria,
        )

    async def _settle(self, entry: Entry) -> Event:
        release = _release(entry)
        wish = await self._versions.settled(release.model)
        if wish.version != release.version:
            return RolledBack("replaced", f"Somebody on the box wished for {wish.name}:{wish.version} meanwhile.")
        if wish.state == "rolled_back":
            return RolledBack(wish.code, wish.reason)
        return Done()

    async def _roll_back(self, entry: Entry) -> Event:
        release = _release(entry)
        if _is_meant(self._versions.wish(release.model), release):
            reason = f"{entry.update.code or 'recalled'}: {entry.update.detail}"
            code = REQUESTED if entry.update.recall else entry.update.code or REQUESTED
            try:
                await self._versions.rollback(release.model, origin=_origin(entry), reason=reason, code=code)
            except NotFoundError as error:  # it was the first version: there is nothing to go back to
                return Refused("no_previous_version", str(error))
        return Done()

    async def _discard(self, entry: Entry) -> None:
        """Leave nothing behind but what a newer job may go on with."""
        if entry.update.code not in ("superseded", "expired"):
            digests = [each.digest for each in self._journal.piece_lists(entry.update.version)]
            for digest in digests:
                await self._journal.commit(digest, b"")
            await in_thread(self._staging.discard_files, digests)
        release = entry.release
        if release is None or entry.was_present or entry.update.state not in ("fetched", "staged", "testing"):
            return
        wish = self._versions.wish(release.model)
        if wish is None or release.version not in (wish.version, wish.previous):
            await in_thread(self._staging.unregister, release)

    async def tidy(self, entry: Entry) -> bool:
        """Remove a version that went back from its trial, unless somebody wants it by now.

        What speaks against it (`rolled_back`) stays in the journal. While a process has it loaded it stays.

        Returns:
            Whether that is done with.
        """
        release = _release(entry)
        wish = self._versions.wish(release.model)
        if wish is None or release.version not in (wish.meant, wish.previous):
            try:
                if await in_thread(self._staging.is_present, release):
                    await in_thread(self._staging.unregister, release)
                    LOGGER.info("%s is removed: it went back from its trial", _full_name(release))
            except ConflictError as error:
                LOGGER.info("%s stays for now: %s", _full_name(release), error)
                if error.code != "model_exists":
                    return False
        await self._journal.tidied(entry.update.version)
        return True

    async def _look_for_damage(self, entry: Entry, error: DamagedFileError) -> Event:
        """Drop the pieces that are wrong on the disk; if none is, the release itself contradicts itself."""
        pieces = next(each for each in self._journal.piece_lists(entry.update.version) if each.digest == error.digest)
        try:
            if not await in_thread(is_reserved, self._blobs, pieces):  # torn, or grown: its length alone is wrong
                await self._journal.commit(pieces.digest, b"")
                await in_thread(reserve, self._blobs, pieces)
            with self._open(pieces, Lies(), _Teller(self._journal, entry, [])) as download:
                await download.drop_wrong()
                if download.complete:
                    return Refused("wrong_hash", f"{error} Its piece list contradicts that.")
        except (StorageError, ConflictError) as failure:
            return Stumbled(failure.code, str(failure), self._clock.unix())
        return Damaged(str(error))

    def _has(self, pieces: PieceList) -> bool:
        return self._blobs.has(pieces.digest, pieces.length)

    def _open(self, pieces: PieceList, lies: Lies, teller: _Teller) -> Download:
        return Download(
            self._blobs,
            pieces,
            safe=self._journal.safe(pieces.digest),
            commit=teller.commit,
            clock=self._clock,
            lies=lies,
        )

    def _sources(self, entry: Entry, length: int) -> Sequence[Source]:
        release = _release(entry)
        if entry.is_local:  # a person stands there and wants to hear at once what the folder lacks
            return [BlobSource(lambda: self._staging.resembling(release)), FolderSource(folder_of(entry.job))]
        return in_order(
            length,
            here=BlobSource(lambda: self._staging.resembling(release)),
            folders=[FolderSource(each) for each in self._folders()],
            mirrors=self._mirrors(entry.job),
            hub=self._hub.source(patient=False),
            patient_hub=self._hub.source(patient=True),
        )

    def _mirrors(self, job: Job) -> Sequence[Source]:
        hub = [MirrorSource(job.files, context=self._context)] if job.files else []
        return [*(MirrorSource(each) for each in job.mirrors), *hub]


class _Teller:
    """Commits safe pieces, and reports the percentage of all files at most every few percent."""

    def __init__(self, journal: Journal, entry: Entry, lists: Sequence[PieceList]) -> None:
        self._journal = journal
        self._entry = entry
        self._lists = {each.digest: each for each in lists}
        self._safe = {
            each.digest: len(from_bitmap(journal.safe(each.digest), each.count)) for each in self._lists.values()
        }
        self._told = self._percent()

    async def commit(self, digest: str, bitmap: bytes) -> None:
        await self._journal.commit(digest, bitmap)
        if digest not in self._lists:
            return
        self._safe[digest] = len(from_bitmap(bitmap, self._lists[digest].count))
        percent = self._percent()
        if percent >= self._told + PERCENT_STEP:
            self._told = percent
            await self._journal.tell_percent(self._entry.update, percent)

    def _percent(self) -> int:
        total = sum(each.count for each in self._lists.values())
        return 100 * sum(self._safe.values()) // total if total else 0


def _is_meant(wish: Wish | None, release: Release) -> bool:
    return wish is not None and wish.version == release.version and wish.state != "rolled_back"


def _release(entry: Entry) -> Release:
    if entry.release is None:
        raise InvalidRequestError(
            f"The journal has no verified release for the job {entry.job.id}.",
            advice="Send the job again under a new version.",
            code="journal_torn",
        )
    return entry.release


def _full_name(release: Release) -> str:
    return f"{release.model}:{release.version}"


def _origin(entry: Entry) -> str:
    return f"job {entry.job.id}"
