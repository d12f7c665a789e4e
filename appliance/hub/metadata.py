"""The four roles of the signed (TUF) repository, as the hub reads, changes and signs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from appliance.core.errors import StorageError, UntrustedError
from appliance.hub.signing_rules import VALID_S, next_version
from appliance.security.metadata import ISSUED, Target
from appliance.security.signing import PublicKey, SigningKey

T = TypeVar("T", Root, Timestamp, Snapshot, Targets)

COUNTERS = "x-counters"
"""A signed field of the targets: the newest release counter of each model, withdrawn ones too."""


@dataclass(slots=True)
class Roles:
    """All four roles; `written` collects the files of those that were signed anew."""

    root: Metadata[Root]
    targets: Metadata[Targets]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]
    written: dict[str, bytes] = field(default_factory=dict)

    def sign_root(self, now: float, keys: Sequence[SigningKey]) -> None:
        """Sign the next root."""
        version = self.root.signed.version + 1
        self.written[f"{version}.root.json"] = _sign(self.root, "root", version, now, keys)

    def sign_targets(self, now: float, keys: Sequence[SigningKey], *, restart: bool = False, at_least: int = 0) -> None:
        """Sign the next targets; the snapshot names them from now on, and has to be signed too."""
        version = next_version(self.targets.signed.version, restart=restart, at_least=at_least)
        data = _sign(self.targets, "targets", version, now, keys)
        self.snapshot.signed.meta["targets.json"] = MetaFile.from_data(version, data, ["sha256"])
        self.written[f"{version}.targets.json"] = data

    def sign_snapshot(
        self, now: float, keys: Sequence[SigningKey], *, restart: bool = False, at_least: int = 0
    ) -> None:
        """Sign the next snapshot; the timestamp names it from now on, and has to be signed too."""
        version = next_version(self.snapshot.signed.version, restart=restart, at_least=at_least)
        data = _sign(self.snapshot, "snapshot", version, now, keys)
        self.timestamp.signed.snapshot_meta = MetaFile.from_data(version, data, ["sha256"])
        self.written[f"{version}.snapshot.json"] = data

    def sign_timestamp(
        self, now: float, keys: Sequence[SigningKey], *, restart: bool = False, at_least: int = 0
    ) -> None:
        """Sign the next timestamp."""
        version = next_version(self.timestamp.signed.version, restart=restart, at_least=at_least)
        self.written["timestamp.json"] = _sign(self.timestamp, "timestamp", version, now, keys)

    def role(self, name: str) -> Metadata[Root] | Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp]:
        """Return one of them by its name."""
        found: dict[str, Metadata[Root] | Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp]] = {
            "root": self.root,
            "targets": self.targets,
            "snapshot": self.snapshot,
            "timestamp": self.timestamp,
        }
        return found[name]

    def version(self, role: str) -> int:
        """Return the version of a role."""
        return int(self.role(role).signed.version)

    def key_ids(self, role: str) -> list[str]:
        """Return the ids of the keys that may sign for a role."""
        return list(self.root.signed.roles[role].keyids)

    def threshold(self, role: str) -> int:
        """Return how many of them have to sign."""
        return int(self.root.signed.roles[role].threshold)

    def issued(self, role: str) -> float:
        """Return when a role was signed, in Unix seconds."""
        return float(self.role(role).signed.unrecognized_fields.get(ISSUED, 0))

    def expires(self, role: str) -> float:
        """Return when a role expires, in Unix seconds."""
        return float(self.role(role).signed.expires.timestamp())

    def counters(self) -> dict[str, int]:
        """Return the newest release counter of each model."""
        return dict(self.targets.signed.unrecognized_fields.get(COUNTERS, {}))

    def set_counters(self, counters: Mapping[str, int]) -> None:
        """Note the newest release counter of each model; the targets have to be signed after it."""
        self.targets.signed.unrecognized_fields[COUNTERS] = dict(counters)

    def target_files(self) -> dict[str, Target]:
        """Return every signed file by its path."""
        found = self.targets.signed.targets
        return {path: Target(path, each.length, each.hashes["sha256"]) for path, each in found.items()}

    def set_target(self, path: str, data: bytes) -> Target:
        """Name a file in the targets, which have to be signed after it."""
        entry = TargetFile.from_data(path, data, ["sha256"])
        self.targets.signed.targets[path] = entry
        return Target(path, entry.length, entry.hashes["sha256"])

    def replace_keys(self, role: str, leaving: Iterable[str], coming: Iterable[PublicKey], threshold: int) -> None:
        """Change who may sign for a role; the root has to be signed after it."""
        for each in leaving:
            self.root.signed.revoke_key(each, role)
        for key in coming:
            self.root.signed.add_key(key.library_key, role)
        self.root.signed.roles[role].threshold = threshold

    def check_against(self, anchor: bytes, files: Mapping[str, bytes]) -> None:
        """Check root and targets as a device would, from a root that was kept away from the hub, before a person signs.

        Whoever took the hub over could have changed its folder, and would have the rightful keys sign the change.

        Args:
            anchor: Root metadata, this one or an older one.
            files: All metadata of the generation.

        Raises:
            UntrustedError: They do not follow from that root.
        """
        reason = "its root is another"
        try:
            trusted = TrustedMetadataSet(anchor, EnvelopeType.METADATA)
            while f"{trusted.root.version + 1}.root.json" in files:
                trusted.update_root(files[f"{trusted.root.version + 1}.root.json"])
            trusted.root.verify_delegate("targets", self.targets.signed_bytes, self.targets.signatures)
            if trusted.root == self.root.signed:
                return
        except RepositoryError as error:
            reason = str(error)
        raise UntrustedError(
            f"The repository on this hub was not signed by those who hold the offline keys: {reason}.",
            advice="Someone may have changed the hub's folder: restore it from a backup before you sign anything.",
            code="repository_changed",
        )


def first_roles(keys: Mapping[str, Iterable[PublicKey]], thresholds: Mapping[str, int]) -> Roles:
    """Return the roles of a new repository, not signed yet; each has version 0, so that the first signature makes 1."""
    root = Root(consistent_snapshot=True)
    for role, publics in keys.items():
        for each in publics:
            root.add_key(each.library_key, role)
        root.roles[role].threshold = thresholds.get(role, 1)
    roles = Roles(Metadata(root), Metadata(Targets()), Metadata(Snapshot()), Metadata(Timestamp()))
    for name in ("root", "targets", "snapshot", "timestamp"):
        roles.role(name).signed.version = 0
    return roles


def load_roles(files: Mapping[str, bytes]) -> Roles:
    """Return the newest of each role.

    Args:
        files: All metadata of a generation by their names.

    Raises:
        StorageError: One is missing or damaged.
    """
    newest = max((int(name.partition(".")[0]) for name in files if name.endswith(".root.json")), default=0)
    root = _read(Root, files, f"{newest}.root.json")
    timestamp = _read(Timestamp, files, "timestamp.json")
    snapshot = _read(Snapshot, files, f"{timestamp.signed.snapshot_meta.version}.snapshot.json")
    targets = _read(Targets, files, f"{snapshot.signed.meta['targets.json'].version}.targets.json")
    return Roles(root, targets, snapshot, timestamp)


def _read(kind: type[T], files: Mapping[str, bytes], name: str) -> Metadata[T]:
    damage = StorageError(
        f"The signed repository's {name} is missing or damaged.",
        advice="Restore the hub's folder from a backup; devices keep what they have meanwhile.",
        code="repository_damaged",
    )
    if name not in files:
        raise damage
    try:
        metadata: Metadata[T] = Metadata.from_bytes(files[name])
    except RepositoryError as error:
        raise damage from error
    if not isinstance(metadata.signed, kind):
        raise damage
    return metadata


def _sign(metadata: Metadata[T], role: str, version: int, now: float, keys: Sequence[SigningKey]) -> bytes:
    metadata.signed.version = version
    metadata.signed.expires = datetime.fromtimestamp(int(now + VALID_S[role]), tz=UTC)
    metadata.signed.unrecognized_fields[ISSUED] = int(now)
    metadata.signatures.clear()
    for key in keys:
        metadata.sign(key.signer, append=True)
    return metadata.to_bytes()
