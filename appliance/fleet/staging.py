"""From fetched files to a registered model, and back: through the registry's own door, with all its checks.

    whole-file hash ─▶ header ─▶ fsync, rename, fsync of the folder ─▶ the registry checks again and registers

It is registered aside: what the model's short name means does not change by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from appliance.core.errors import ApplianceError, InvalidRequestError, NotFoundError
from appliance.core.releases import Release, ReleaseFile
from appliance.fleet import download
from appliance.registry.catalog import CatalogEntry
from appliance.registry.files import sha256_of, storage_errors
from appliance.registry.gguf_header import read_header
from appliance.registry.install import find_installed, pull
from appliance.registry.manifest import Manifest
from appliance.registry.roles import MODEL
from appliance.registry.versions import Registry


class DamagedFileError(ApplianceError):
    """A fetched file is not what its pieces were."""

    default_code = "damaged"

    def __init__(self, digest: str, found: str) -> None:
        super().__init__(f"The fetched file sha256-{digest} has the SHA-256 {found} as a whole.")
        self.digest = digest


@dataclass(frozen=True, slots=True)
class Box:
    """What a release must suit.

    Attributes:
        hardware: Hardware class.
        agent: Version of this program.
        memory: Bytes.
    """

    hardware: str
    agent: str
    memory: int


def check_suits(release: Release, box: Box) -> None:
    """Refuse a release that is not for this box.

    Raises:
        InvalidRequestError: It is for other hardware, a newer program or more memory, or is no model we can register.
    """
    if release.hardware and box.hardware not in release.hardware:
        raise _incompatible(release, f"is for {', '.join(release.hardware):.300}; this is {box.hardware or 'unknown'}")
    if release.least_agent and _ordered(box.agent) < _ordered(release.least_agent):
        raise _incompatible(release, f"needs appliance {release.least_agent:.50}; this is {box.agent}")
    if box.memory and release.minimum_memory > box.memory:
        raise _incompatible(release, f"needs {release.minimum_memory:,} bytes of memory; there are {box.memory:,}")
    manifest_of(release)


def manifest_of(release: Release) -> Manifest:
    """Return the manifest under which the registry takes the release in.

    Raises:
        InvalidRequestError: It breaks a rule of manifests, such as two graphs or a path that leads out of the folder.
    """
    try:
        return msgspec.convert(
            {
                "name": release.model,
                "version": release.version,
                "kind": release.kind,
                "task": release.task,
                "licence": release.licence,
                "minimum_memory": release.minimum_memory or sum(each.length for each in release.files),
                "files": [_manifest_file(each) for each in release.files],
                "defaults": {
                    "context": release.default_context,
                    "template": release.chat_template,
                    "stop": list(release.stop),
                },
            },
            Manifest,
        )
    except msgspec.ValidationError as error:
        raise _incompatible(release, f"cannot be registered: {error}") from error


class Staging:
    """Puts the files of releases into the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def is_present(self, release: Release) -> bool:
        """Tell whether the release is registered here with all its files.

        Raises:
            ConflictError: Other files have its name and version.
        """
        return find_installed(self._entry(release), self._registry) is not None

    def lacking(self, release: Release) -> list[ReleaseFile]:
        """Return the files that are not here, each digest once."""
        blobs = self._registry.blobs
        files = {each.digest: each for each in release.files if not blobs.has(each.digest, each.length)}
        return list(files.values())

    def resembling(self, release: Release) -> list[Path]:
        """Return files on this box that may have pieces in common with the release's."""
        return [file.path for model in self._registry.list() if model.name == release.model for file in model.files]

    def stage(self, release: Release) -> None:
        """Publish the fetched files and register the release. Can be repeated after a crash at any point.

        Raises:
            DamagedFileError: A file as a whole is not what its pieces were; it was left where it is.
            ModelFileError: A file is no sound model; no native code has seen it.
            ConflictError: Other files have its name and version (`model_exists`), or one is in use by others.
            StorageError: The disk failed.
        """
        entry = self._entry(release)
        with ExitStack() as held:
            for file in release.files:
                self._publish(file, release, held)
            pull(entry, self._registry, stall_timeout_s=1.0, aside=True)

    def discard_files(self, digests: Sequence[str]) -> None:
        """Delete what has come of files.

        Raises:
            ConflictError: Another process is fetching one.
        """
        for digest in digests:
            download.discard(self._registry.blobs, digest)

    def unregister(self, release: Release) -> None:
        """Remove the release, if it is registered.

        Raises:
            ConflictError: A process has it loaded.
        """
        try:
            self._registry.remove(f"{release.model}:{release.version}")
        except NotFoundError:
            self._registry.remove_unused_files()

    def _entry(self, release: Release) -> CatalogEntry:
        return CatalogEntry(manifest_of(release), self._registry.blobs.folder)

    def _publish(self, file: ReleaseFile, release: Release, held: ExitStack) -> None:
        blobs = self._registry.blobs
        if blobs.has(file.digest, file.length):
            held.enter_context(blobs.hold([file.digest]))
            download.forget_hints(blobs, file.digest)  # a kill may have come right before it
            return
        partial = blobs.partial(file.digest)
        held.callback(partial.close)
        with storage_errors(partial.path):
            found = sha256_of(partial.file)
        if found != file.digest or partial.size != file.length:
            raise DamagedFileError(file.digest, found)
        if release.kind == "gguf" and file.role == MODEL:
            read_header(partial.path)
        partial.publish(file.digest)
        download.forget_hints(blobs, file.digest)


def _manifest_file(file: ReleaseFile) -> dict[str, Any]:
    found: dict[str, Any] = {"role": file.role, "sha256": file.digest, "size": file.length}
    return found | {"name": "model"} if file.role == MODEL else found


def _ordered(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, `1.10.0rc1` counting as `1.10.0`."""
    numbers: list[int] = []
    for part in version.split("."):
        digits = part[: next((at for at, character in enumerate(part) if not character.isdigit()), len(part))]
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _incompatible(release: Release, why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The release {release.model}:{release.version} {why}.",
        advice="Choose another release for this device.",
        code="incompatible",
    )
