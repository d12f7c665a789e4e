"""A client of a signed (TUF) repository: verifies each step, and keeps what was verified in a record of its own.

This drives python-tuf's rules, its `TrustedMetadataSet`, and not its `Updater`, whose files can be torn so that older
signed metadata is taken for new, which goes by the machine's clock, and which is of no use without a network. Here

    - the newest version ever verified of each role is kept apart from the metadata itself and checked by itself;
    - the time comes from `trust_rules.reference_time`;
    - the record is enough to look up a target while the hub is away;
    - nobody downloads a target whole: each is asked for up to its signed length and checked in memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Protocol

from tuf.api.exceptions import (
    BadVersionNumberError,
    EqualVersionNumberError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Root, Signed, TargetFile
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from appliance.core.build import BUILT
from appliance.core.errors import NotFoundError, UntrustedError
from appliance.security.trust_rules import (
    ROLES,
    Mark,
    RoleKeys,
    after_root,
    check_version,
    raised,
    reference_time,
)

METADATA = "metadata"
TARGETS = "targets"
ISSUED = "x-issued"
"""A signed field of each role: when it was signed, in Unix seconds."""

LARGEST_ROOT_BYTES = 512_000
LARGEST_TIMESTAMP_BYTES = 16_384
LARGEST_SNAPSHOT_BYTES = 256_000
LARGEST_TARGETS_BYTES = 8_000_000
MOST_ROTATIONS = 256
"""Of the root, in one refresh."""

Fetch = Callable[[str, int], Awaitable[bytes | None]]
"""Returns a file of the repository by its path, at most so many bytes of it, or None if there is no such file."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a client has verified so far.

    Attributes:
        anchor: The root metadata that came with the client; everything else follows from it.
        documents: The newest verified metadata of each role, as it came.
        marks: How far each role has come, whatever became of its document.
    """

    anchor: bytes
    documents: Mapping[str, bytes]
    marks: Mapping[str, Mark]


class Record(Protocol):
    """Where a client keeps what it has verified."""

    def kept(self) -> Kept:
        """Return all of it.

        Raises:
            NotFoundError: There is no anchor.
        """
        ...

    async def keep(self, role: str, document: bytes, marks: Mapping[str, Mark]) -> None:
        """Replace the document of a role, and all marks, at once; durable when this returns."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """A signed file of the repository; `digest` is its SHA-256 in hex."""

    path: str
    length: int
    digest: str

    @property
    def stored(self) -> str:
        """Return where the repository has it: the digest is part of the name, so that an old one stays beside a new."""
        path = PurePosixPath(self.path)
        return str(PurePosixPath(TARGETS) / path.with_name(f"{self.digest}.{path.name}"))


class Verified:
    """Metadata that was verified down to the targets, and had not expired at that time."""

    def __init__(self, trusted: TrustedMetadataSet) -> None:
        self._trusted = trusted

    def versions(self) -> dict[str, int]:
        """Return the version of each role."""
        return {role: self._trusted[role].version for role in ROLES}

    def expires(self) -> dict[str, float]:
        """Return when each role expires, in Unix seconds."""
        return {role: self._trusted[role].expires.timestamp() for role in ROLES}

    def targets(self) -> dict[str, Target]:
        """Return every signed file by its path."""
        return {path: _target(path, each) for path, each in self._trusted.targets.targets.items()}

    def target(self, path: str) -> Target:
        """Return a signed file.

        Raises:
            UntrustedError: The repository has none of that path.
        """
        found = self._trusted.targets.targets.get(path)
        if found is None:
            raise UntrustedError(
                f"The signed repository has no {path}.",
                advice="It was withdrawn, or never signed. `appliance hub releases list` shows what there is.",
                code="not_released",
            )
        return _target(path, found)

    def check(self, path: str, data: bytes) -> bytes:
        """Return the content of a signed file if it is that.

        Raises:
            UntrustedError: It is not.
        """
        self.target(path)
        with refusing(path):
            self._trusted.targets.targets[path].verify_length_and_hashes(data)
        return data


class Client:
    """Looks through a repository on behalf of a record."""

    def __init__(self, record: Record, *, built: float = BUILT) -> None:
        self._record = record
        self._built = built

    def recorded(self, hub_time: float = 0.0) -> Verified:
        """Return what was verified before, verified again; works without any hub.

        Args:
            hub_time: Unix seconds by the hub's clock, 0 if it is not known.

        Raises:
            NotFoundError: Nothing was verified down to the targets yet, or it is damaged.
            UntrustedError: It has expired, or is older than what was seen.
        """
        kept = self._record.kept()
        trusted = self._start(kept)
        try:
            documents = [kept.documents[role] for role in ROLES[1:]]
        except KeyError as error:
            raise NotFoundError("Nothing of the hub's repository was verified yet.", code="never_verified") from error
        trusted.reference_time = _moment(reference_time(self._built, kept.marks, hub_time))
        with refusing("recorded metadata"):
            trusted.update_timestamp(documents[0])
            trusted.update_snapshot(documents[1], trusted=True)
            trusted.update_targets(documents[2])
        for role in ROLES:
            check_version(role, trusted[role].version, kept.marks)
        return Verified(trusted)

    async def refresh(self, fetch: Fetch, hub_time: Callable[[], float] = lambda: 0.0) -> Verified:
        """Bring the record up to date with a repository, step by step, each kept as soon as it is verified.

        Args:
            fetch: Reads the repository.
            hub_time: Returns Unix seconds by the hub's clock, 0 if it is not known; asked once `fetch` has returned.

        Raises:
            UntrustedError: The repository has something that is not to be believed; what was kept stays as it was.
            ApplianceError: As `fetch` raises.
        """
        kept = self._record.kept()
        trusted = self._start(kept)
        marks = await self._walk_roots(trusted, fetch, dict(kept.marks))
        for role in ROLES[1:]:
            trusted.reference_time = _moment(reference_time(self._built, marks, hub_time()))
            marks = await self._step(role, trusted, fetch, kept, marks)
        return Verified(trusted)

    def _start(self, kept: Kept) -> TrustedMetadataSet:
        """Begin with the newest root there is, or, if that is damaged, with the anchor."""
        with refusing("root metadata"):
            try:
                return TrustedMetadataSet(kept.documents.get("root", kept.anchor), EnvelopeType.METADATA)
            except RepositoryError:
                return TrustedMetadataSet(kept.anchor, EnvelopeType.METADATA)

    async def _walk_roots(self, trusted: TrustedMetadataSet, fetch: Fetch, marks: dict[str, Mark]) -> dict[str, Mark]:
        """Follow the roots one by one, each signed by enough keys of the one before and of its own."""
        for _ in range(MOST_ROTATIONS):
            version = trusted.root.version + 1
            data = await fetch(f"{METADATA}/{version}.root.json", LARGEST_ROOT_BYTES)
            if data is None:
                break
            before = _role_keys(trusted.root)
            with refusing("root metadata"):
                trusted.update_root(data)
            if version > marks.get("root", Mark(0)).version:
                marks = after_root(marks, before, _role_keys(trusted.root))
            marks = raised(marks, "root", version, _issued(trusted.root))
            await self._record.keep("root", data, marks)
        check_version("root", trusted.root.version, marks)
        return marks

    async def _step(
        self, role: str, trusted: TrustedMetadataSet, fetch: Fetch, kept: Kept, marks: dict[str, Mark]
    ) -> dict[str, Mark]:
        """Load one role: from the record if that is what is wanted, else from the repository."""
        if self._load_kept(role, trusted, kept):
            check_version(role, trusted[role].version, marks)
            return marks
        name, most = _wanted(role, trusted, marks)
        data = await fetch(name, most)
        if data is None:
            raise UntrustedError(
                f"The hub's repository lacks {name}.",
                advice="If it is being changed just now, the next try finds it; `appliance hub releases verify` looks.",
                code="metadata_missing",
            )
        with refusing(f"{role} metadata"), suppress(EqualVersionNumberError):  # the timestamp known already stays
            _update(role, trusted, data)
        version = check_version(role, trusted[role].version, marks)
        marks = raised(marks, role, version, _issued(trusted[role]))
        await self._record.keep(role, data, marks)
        return marks

    @staticmethod
    def _load_kept(role: str, trusted: TrustedMetadataSet, kept: Kept) -> bool:
        """Try the record's document; True if it is the one that the metadata before it names."""
        document = kept.documents.get(role)
        if document is None:
            return False
        try:
            if role == "snapshot":
                trusted.update_snapshot(document, trusted=True)
            else:
                _update(role, trusted, document)
        except RepositoryError:
            return False  # damaged, expired, of a key that counts no more, or not the newest
        return role != "timestamp"


def _update(role: str, trusted: TrustedMetadataSet, data: bytes) -> None:
    if role == "timestamp":
        trusted.update_timestamp(data)
    elif role == "snapshot":
        trusted.update_snapshot(data)
    else:
        trusted.update_targets(data)


def _wanted(role: str, trusted: TrustedMetadataSet, marks: Mapping[str, Mark]) -> tuple[str, int]:
    """Return the path of a role's metadata and the most bytes that it may have."""
    if role == "timestamp":
        return f"{METADATA}/timestamp.json", LARGEST_TIMESTAMP_BYTES
    if role == "snapshot":
        meta, most = trusted.timestamp.snapshot_meta, LARGEST_SNAPSHOT_BYTES
    else:
        found = trusted.snapshot.meta.get("targets.json")
        if found is None:
            raise UntrustedError("The snapshot metadata names no targets.", code="bad_metadata")
        meta, most = found, LARGEST_TARGETS_BYTES
    version = check_version(role, meta.version, marks)
    return f"{METADATA}/{version}.{role}.json", min(meta.length or most, most)


def _role_keys(root: Root) -> dict[str, RoleKeys]:
    return {role: RoleKeys(frozenset(each.keyids), each.threshold) for role, each in root.roles.items()}


def _issued(signed: Signed) -> float:
    """Return when it was signed, if that makes sense: before it expires."""
    issued = signed.unrecognized_fields.get(ISSUED)
    if isinstance(issued, int) and 0 <= issued < signed.expires.timestamp():
        return float(issued)
    return 0.0


def _moment(unix_seconds: float) -> datetime:
    return datetime.fromtimestamp(min(unix_seconds, 4e9), tz=UTC)


def _target(path: str, found: TargetFile) -> Target:
    digest = found.hashes.get("sha256")
    if digest is None:
        raise UntrustedError(f"The signed repository gives no SHA-256 of {path}.", code="bad_metadata")
    return Target(path, found.length, digest)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn tuf's refusals into ours."""
    try:
        yield
    except ExpiredMetadataError as error:
        raise UntrustedError(
            f"The {what} has expired: {error}.",
            advice="The running models are not touched. Let the hub sign again, and look at its clock.",
            code="metadata_expired",
        ) from error
    except BadVersionNumberError as error:
        raise UntrustedError(f"The {what} has the wrong version: {error}.", code="metadata_old") from error
    except UnsignedMetadataError as error:
        raise UntrustedError(f"The {what} is not signed by enough keys: {error}.", code="bad_signature") from error
    except LengthOrHashMismatchError as error:
        raise UntrustedError(f"The {what} is not what was signed: {error}.", code="wrong_content") from error
    except RepositoryError as error:
        raise UntrustedError(f"The {what} cannot be read: {error}.", code="bad_metadata") from error
