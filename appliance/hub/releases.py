"""Releases: model files and what they must meet, signed with the offline targets keys.

    files ──> blobs, piece lists ──> release document ──> signed targets (from here on it counts) ──> row in hub.db

Whoever is killed before the signature leaves files that no release has; after it, a row that is missing, which the
next look at the repository adds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, ConflictError, InvalidRequestError
from appliance.core.fleet import BLOCK_BYTES
from appliance.core.releases import (
    DIRECTOR_TARGET,
    LARGEST_RELEASE_BYTES,
    Criteria,
    Release,
    ReleaseFile,
    pieces_target,
    release_target,
)
from appliance.hub.authority import Authority
from appliance.hub.release_blobs import ReleaseBlobs, StoredFile
from appliance.hub.release_records import ReleaseStore, SignedRelease, find_release
from appliance.security.metadata import Client, MemoryRecord, Target, Verified
from appliance.security.repository_files import read_slice
from appliance.store.files import Progress, no_progress


@dataclass(frozen=True, slots=True)
class DraftFile:
    """A file to be released: where it lies, and what it has to be if that is known."""

    role: str
    path: Path
    expected: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A release before it is signed; the fields are those of `Release`.

    Attributes:
        least_counter: The release counter is no less than this: for a hub that was restored from a backup.
    """

    model: str
    version: str
    kind: str
    task: str
    licence: str
    files: Sequence[DraftFile]
    minimum_memory: int = 0
    hardware: tuple[str, ...] = ()
    least_agent: str = ""
    default_context: int | None = None
    chat_template: str | None = None
    stop: tuple[str, ...] = ()
    criteria: Criteria = field(default_factory=Criteria)
    least_counter: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """What `verify` found of one thing: `problem` is "" if it is sound."""

    subject: str
    detail: str
    problem: str = ""


class Releases:
    """Adds, lists, withdraws and verifies releases of one hub."""

    def __init__(self, authority: Authority, blobs: ReleaseBlobs, store: ReleaseStore, clock: Clock) -> None:
        """Work on the hub's folder and database."""
        self._authority = authority
        self._blobs = blobs
        self._store = store
        self._clock = clock

    def listed(self) -> Sequence[SignedRelease]:
        """Return all releases, withdrawn ones too, as the signed repository has them."""
        self._catch_up()
        return self._store.list()

    def find(self, name: str) -> SignedRelease:
        """Return the newest release that can be installed of `model`, `model:version` or `model#counter`.

        Raises:
            NotFoundError: There is none.
        """
        return find_release(self.listed(), name)

    def add(self, draft: Draft, actor: str, progress: Progress = no_progress) -> SignedRelease:
        """Store the files and sign a release; durable and visible to devices when this returns.

        Raises:
            NotFoundError: A file, or the targets keys, are not at hand.
            UntrustedError: A file is another one than the manifest says, or someone changed the repository.
            ConflictError: The version was released with other files.
            InvalidRequestError: A field will not do.
            StorageError: The disk is full or failed.
        """
        self._authority.require_targets_keys()
        before = [each.release for each in self.listed()]
        with self._blobs.adding():
            stored = [(each.role, self._blobs.store(each.path, each.expected, progress)) for each in draft.files]
            release = self._release(draft, stored, before)
            signed = _signed(release)
            files = {signed.target: msgspec.json.encode(release)}
            for _, file in stored:
                files[pieces_target(release.model, release.counter, file.digest)] = file.pieces
            self._authority.change_targets(files, counters={release.model: release.counter})
        self._store.add(signed, actor)
        return signed

    def withdraw(self, name: str, reason: str, actor: str) -> SignedRelease:
        """Sign that a release is no longer to be installed; devices that run it go on.

        Raises:
            NotFoundError: There is no such release, or the targets keys are not at hand.
            UntrustedError: Someone changed the repository.
        """
        found = self.find(name)
        prefix = found.target.removesuffix("release.json")
        removed = [path for path in self._authority.targets() if path.startswith(prefix)]
        self._authority.change_targets({}, removed)
        self._store.withdraw(found.target, reason, actor)
        return found

    def remove_unused_files(self) -> int:
        """Delete model files that only withdrawn releases have; return the bytes that this freed."""

        def find_used() -> frozenset[str]:
            live = [each.release for each in self.listed() if each.withdrawn is None]
            return frozenset(file.digest for each in live for file in each.files)

        return self._blobs.remove_unused(find_used)

    async def verify(self, *, deep: bool, progress: Progress = no_progress) -> list[Finding]:
        """Check the repository as a new device would, and that every model file is there; nothing is changed.

        Args:
            deep: Read every model file too.
            progress: Told of what is read.
        """
        folder = self._authority.repository.folder
        fetch = fetching(folder)
        record = MemoryRecord(self._authority.repository.metadata()["1.root.json"])
        try:
            verified = await Client(record).refresh(fetch, self._clock.unix)
        except ApplianceError as error:
            return [Finding("metadata", "", str(error))]
        versions = ", ".join(f"{role} {version}" for role, version in verified.versions().items())
        findings = [Finding("metadata", f"signed and valid: {versions}")]
        for target in verified.targets().values():
            if target.path.endswith("/release.json"):
                findings += await self._verify_release(verified, target, fetch, deep, progress)
        findings.append(await self._verify_file(verified, DIRECTOR_TARGET, fetch))
        return findings

    def _release(self, draft: Draft, stored: Sequence[tuple[str, StoredFile]], before: Sequence[Release]) -> Release:
        known = [each.counter for each in before if each.model == draft.model]
        counter = max([*known, self._authority.roles().counters().get(draft.model, 0)], default=0) + 1
        counter = max(counter, draft.least_counter)
        fields = {
            "model": draft.model,
            "version": draft.version,
            "counter": counter,
            "kind": draft.kind,
            "task": draft.task,
            "licence": draft.licence,
            "files": [{"role": role, "length": each.length, "digest": each.digest} for role, each in stored],
            "minimum_memory": draft.minimum_memory,
            "hardware": draft.hardware,
            "least_agent": draft.least_agent,
            "created": self._clock.unix(),
            "default_context": draft.default_context,
            "chat_template": draft.chat_template,
            "stop": draft.stop,
            "criteria": draft.criteria,
        }
        try:
            release = msgspec.convert(msgspec.to_builtins(fields), type=Release)
        except msgspec.ValidationError as error:
            raise InvalidRequestError(f"This cannot be released: {error}.") from error
        if len(msgspec.json.encode(release)) > LARGEST_RELEASE_BYTES:
            raise InvalidRequestError(
                f"The release document is over {LARGEST_RELEASE_BYTES:,} bytes.", advice="Use fewer golden inputs."
            )
        _check_version(release, before)
        return release

    def _catch_up(self) -> None:
        """Bring the index in line with the signed repository, if someone was killed between the two."""
        targets = self._authority.targets()
        known = {each.target: each for each in self._store.list()}
        for path, target in targets.items():
            if path.endswith("/release.json") and path not in known:
                release = msgspec.json.decode(self._authority.read_target(target), type=Release)
                self._store.add(_signed(release), "hub")
        for path, each in known.items():
            if each.withdrawn is None and path not in targets:
                self._store.withdraw(path, "it is no longer signed", "hub")

    async def _verify_release(
        self, verified: Verified, target: Target, fetch: Fetching, deep: bool, progress: Progress
    ) -> list[Finding]:
        found = await self._verify_file(verified, target.path, fetch)
        if found.problem:
            return [found]
        release = msgspec.json.decode((await fetch(target.stored, target.length)) or b"", type=Release)
        if target.path != release_target(release.model, release.counter):
            return [Finding(target.path, "", f"it is release {release.counter} of {release.model}")]
        findings = [found]
        for file in release.files:
            path = pieces_target(release.model, release.counter, file.digest)
            findings.append(await self._verify_file(verified, path, fetch))
            findings.append(self._verify_blob(file, deep, progress))
        return findings

    async def _verify_file(self, verified: Verified, path: str, fetch: Fetching) -> Finding:
        with _problem(path) as problem:
            target = verified.target(path)
            verified.check(path, await fetch(target.stored, target.length) or b"")
        return Finding(path, "signed", *problem)

    def _verify_blob(self, file: ReleaseFile, deep: bool, progress: Progress) -> Finding:
        path = self._blobs.path(file.digest)
        with _problem(path.name) as problem:
            if deep and self._blobs.hashed(file.digest, progress).digest != file.digest:
                problem.append("its content is not what its name says")
            elif not path.is_file() or path.stat().st_size != file.length:
                problem.append(f"it is missing, or has not its {file.length:,} bytes")
        return Finding(path.name, "read" if deep else "there", *problem)


Fetching = Callable[[str, int], Awaitable[bytes | None]]


def fetching(folder: Path) -> Fetching:
    """Return how a repository's files are read from its folder, slice by slice as a device is given them."""

    async def fetch(path: str, most: int) -> bytes | None:
        data = b""
        while True:
            answer = read_slice(folder, path, len(data))
            data += answer.data
            if not answer.ok:
                return None
            if len(data) >= min(answer.total, most + BLOCK_BYTES):
                return data

    return fetch


@contextmanager
def _problem(subject: str) -> Iterator[list[str]]:
    problems: list[str] = []
    try:
        yield problems
    except ApplianceError as error:
        problems.append(str(error) or subject)


def _signed(release: Release) -> SignedRelease:
    data = msgspec.json.encode(release)
    target = Target.of(release_target(release.model, release.counter), data)
    return SignedRelease(release, target.path, target.length, target.digest)


def _check_version(release: Release, before: Sequence[Release]) -> None:
    digests = {each.role: each.digest for each in release.files}
    for each in before:
        same = (each.model, each.version) == (release.model, release.version)
        if same and {file.role: file.digest for file in each.files} != digests:
            raise ConflictError(
                f"{release.model}:{release.version} was released before (#{each.counter}) with other files.",
                advice="Give it another version with --version.",
                code="release_exists",
            )
