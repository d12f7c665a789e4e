"""What the device believes: releases that the offline keys signed, and jobs and twins that the director signed.

    job (director's key) ──┐
                           ├── agree on path, length, SHA-256 and counter ──> release ──> piece lists
    targets (offline keys) ┘

So a hub that was taken over can choose among signed releases, and never bring back an older one. What is refused here
changes nothing: neither the record nor the models that run.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import TypeVar

import msgspec

from appliance.core.build import BUILT
from appliance.core.errors import ApplianceError, UnavailableError, UntrustedError
from appliance.core.fleet import PIECE_BYTES, Desired, Job
from appliance.core.releases import (
    DESIRED_TYPE,
    DIRECTOR_TARGET,
    JOB_TYPE,
    LARGEST_RELEASE_BYTES,
    DirectorKeys,
    Release,
    ReleaseFile,
    pieces_target,
    release_target,
)
from appliance.fleet.part import Asking
from appliance.fleet.signed_files import FILE_TIMEOUT_S, SignedFiles
from appliance.fleet.trust_record import TrustRecord
from appliance.security.envelopes import open_envelope
from appliance.security.metadata import Client, Target, Verified
from appliance.security.signing import PublicKey

T = TypeVar("T")

DIGEST_BYTES = 32
_RELEASE = re.compile(r"releases/([a-z0-9][a-z0-9._-]{0,127})/(\d{1,16})/release\.json")
LARGEST_LIST_BYTES = 4 * 1024 * 1024
"""Piece lists of files up to 128 GiB."""


class Trust:
    """Verifies for one device; of several on one record only one looks at the repository at a time."""

    def __init__(
        self,
        device: str,
        record: TrustRecord,
        asking: Asking,
        *,
        release_floor: Callable[[str], int] = lambda _model: 0,
        built: float = BUILT,
        file_timeout_s: float = FILE_TIMEOUT_S,
    ) -> None:
        """Verify nothing yet.

        Args:
            device: Its id.
            record: What was verified so far.
            asking: The hub, or a `FolderAsking`.
            release_floor: Returns the counter below which no release of a model is taken: that of the last one that
                was confirmed.
            built: Unix seconds; no time before it is believed.
            file_timeout_s: In which each file of the repository has to be whole.
        """
        self._device = device
        self._record = record
        self._asking = asking
        self._release_floor = release_floor
        self._client = Client(record, built=built)
        self._turn = asyncio.Lock()
        self._file_timeout_s = file_timeout_s
        self._hub_time = 0.0

    async def refresh(self) -> Verified:
        """Bring the record up to date.

        Raises:
            UnavailableError: The hub is away or too slow.
            UntrustedError: What it has is not to be believed.
            NotFoundError: The device has no root of trust.
        """
        async with self._turn:
            files = SignedFiles(self._asking, timeout_s=self._file_timeout_s)
            verified = await self._client.refresh(files.fetch, lambda: files.hub_time)
            self._hub_time = files.hub_time
            return verified

    async def current(self) -> Verified:
        """Return the newest verified metadata: the hub's, or, while it is away, what was recorded.

        Raises:
            UnavailableError: The hub is away, and nothing was recorded.
            UntrustedError: It is not to be believed, or has expired.
        """
        try:
            return await self.refresh()
        except UnavailableError as away:
            try:
                return self._client.recorded(self._hub_time)
            except UntrustedError:
                raise
            except ApplianceError:
                raise away from None

    async def verified_release(self, job: Job) -> Release:
        """Return the release that a job wants installed, if job and signed repository agree on it.

        One that `offered` made has version 0, which no signed one that counts has: it needs no hub, since it was made
        of the record.

        Raises:
            UntrustedError: They do not, or the release is older than the one that runs; nothing was changed.
            UnavailableError: The hub is away, and the release was not read before.
        """
        verified = await self.current() if job.version else self._client.recorded(self._hub_time)
        target = verified.target(job.target)
        if (target.length, target.digest) != (job.length, job.digest):
            raise UntrustedError(
                f"Job {job.id} and the signed repository do not mean the same {job.target}: "
                f"{job.length:,} bytes with SHA-256 {job.digest:.12}… against "
                f"{target.length:,} with {target.digest:.12}….",
                advice="The job was made for another release, or the hub was changed: make a new rollout.",
                code="job_mismatch",
            )
        release = await self.release(verified, job.target)
        if release.counter != job.counter:
            raise UntrustedError(
                f"Job {job.id} says release {job.counter} of {release.model}, and the release says {release.counter}.",
                code="job_mismatch",
            )
        return release

    async def release(self, verified: Verified, path: str) -> Release:
        """Return a release that is signed under its own name, and not older than the one that runs.

        Raises:
            UntrustedError: It is not.
            UnavailableError: The hub is away, and the release was not read before.
        """
        data = await self._read(verified, path, LARGEST_RELEASE_BYTES)
        try:
            release = msgspec.json.decode(data, type=Release)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UntrustedError(f"The signed {path} is no release: {error}.", code="bad_release") from error
        if path != release_target(release.model, release.counter):
            raise UntrustedError(
                f"The signed {path} is release {release.counter} of {release.model}.", code="bad_release"
            )
        floor = self._release_floor(release.model)
        if release.counter < floor:
            raise UntrustedError(
                f"Release {release.counter} of {release.model} is older than release {floor}, confirmed here before.",
                advice="To go back on purpose, release the old files anew: they get a new counter.",
                code="release_old",
            )
        return release

    async def offered(self) -> list[Job]:
        """Return what the repository has to install, the newest release of each model, as jobs that nobody has signed.

        For an operator at the box itself who brings a folder and decides for himself; `verified_release` takes them.

        Raises:
            UnavailableError: The hub is away, and nothing was recorded.
            UntrustedError: Something of it is not to be believed.
        """
        verified = await self.current()
        newest: dict[str, tuple[int, Target]] = {}
        for path, target in verified.targets().items():
            match = _RELEASE.fullmatch(path)
            if match:
                found = (int(match[2]), target)
                newest[match[1]] = max(newest.get(match[1], found), found, key=lambda each: each[0])
        return [
            Job(
                self._device,
                f"import-{model:.100}-{counter}",
                0,
                "install",
                target=target.path,
                length=target.length,
                digest=target.digest,
                counter=counter,
            )
            for model, (counter, target) in sorted(newest.items())
        ]

    async def piece_list(self, release: Release, file: ReleaseFile) -> list[bytes]:
        """Return the SHA-256 of each piece of a file, in order.

        Raises:
            UntrustedError: The list is not signed, or not of this file's length.
            UnavailableError: The hub is away, and the list was not read before.
        """
        path = pieces_target(release.model, release.counter, file.digest)
        verified = self._recorded_with(path) or await self.current()
        data = await self._read(verified, path, LARGEST_LIST_BYTES)
        if len(data) != -(-file.length // PIECE_BYTES) * DIGEST_BYTES:
            raise UntrustedError(
                f"The signed {path} lists {len(data) / DIGEST_BYTES:g} pieces of a file of {file.length:,} bytes.",
                code="bad_release",
            )
        return [data[at : at + DIGEST_BYTES] for at in range(0, len(data), DIGEST_BYTES)]

    async def director_keys(self, *, fresh: bool = False) -> DirectorKeys:
        """Return whose signature on jobs and desired twins counts.

        Args:
            fresh: Look at the hub even if they are recorded.

        Raises:
            UntrustedError: Their list is not signed.
            UnavailableError: The hub is away, and it was not read before.
        """
        verified = None if fresh else self._recorded_with(DIRECTOR_TARGET)
        data = await self._read(verified or await self.current(), DIRECTOR_TARGET, LARGEST_RELEASE_BYTES)
        try:
            return msgspec.json.decode(data, type=DirectorKeys)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UntrustedError(f"The signed {DIRECTOR_TARGET} is no list: {error}.", code="bad_release") from error

    async def open_job(self, data: bytes) -> Job:
        """Return a job that the director signed for this device, and that is not older than one seen before.

        It may ask the hub, so call it from `run` and not from `handle`.

        Raises:
            UntrustedError: It is not; nothing was changed.
            UnavailableError: The hub is away, and its keys were never read.
        """
        job = _decoded(await self._opened(data, JOB_TYPE), Job)
        await self._see("job", job.device, job.version)
        return job

    async def open_desired(self, data: bytes) -> Desired:
        """Return a desired twin under the same rules as a job."""
        desired = _decoded(await self._opened(data, DESIRED_TYPE), Desired)
        await self._see("desired twin", desired.device, desired.version)
        return desired

    async def _opened(self, data: bytes, payload_type: str) -> bytes:
        keys = await self.director_keys()
        try:
            return _open(data, payload_type, keys)
        except UntrustedError as error:
            if error.code != "bad_signature":
                raise
            fresh = await self.director_keys(fresh=True)  # the director may have a new key since
            return _open(data, payload_type, fresh)

    async def _see(self, kind: str, device: str, version: int) -> None:
        if device != self._device:
            raise UntrustedError(f"A {kind} of the device {device} came to {self._device}.", code="wrong_device")
        await self._record.see(kind, version)

    def _recorded_with(self, path: str) -> Verified | None:
        """Return the recorded metadata if it has that file, and the file is at hand too."""
        try:
            verified = self._client.recorded(self._hub_time)
            return verified if self._at_hand(verified, verified.target(path)) is not None else None
        except ApplianceError:
            return None  # then the hub is asked, which says why if it cannot help

    def _at_hand(self, verified: Verified, target: Target) -> bytes | None:
        kept = self._record.file(target.digest)
        try:
            return None if kept is None else verified.check(target.path, kept)
        except UntrustedError:
            return None  # the disk has damaged it

    async def _read(self, verified: Verified, path: str, most: int) -> bytes:
        target = verified.target(path)
        kept = self._at_hand(verified, target)
        if kept is not None:
            return kept
        if target.length > most:
            raise UntrustedError(f"The signed {path} has {target.length:,} bytes.", code="bad_release")
        data = await SignedFiles(self._asking, timeout_s=self._file_timeout_s).fetch(target.stored, target.length)
        if data is None:
            raise UnavailableError(
                f"The hub lacks its signed file {path}.",
                advice="`appliance hub releases verify` looks; it is tried again.",
                code="target_missing",
            )
        verified.check(path, data)
        await self._record.keep_file(target.digest, data)
        return data


def _open(data: bytes, payload_type: str, keys: DirectorKeys) -> bytes:
    return open_envelope(data, payload_type, [PublicKey(each) for each in keys.keys], keys.threshold)


def _decoded(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UntrustedError(f"The signed {kind.__name__} is none: {error}.", code="wrong_document") from error
