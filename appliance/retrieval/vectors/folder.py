"""The files of one store's index: whole or not there, and never searched unless every byte is what was written.

    manifest.json      SHA-256 of its second line; which generation holds, that one's SHA-256, and what it is
    <id>.vectors       a generation: faiss's index, then the chunk ids
    <id>.partial       one being written; a leftover once its process is gone

A generation is written aside, synced and renamed; then the manifest is, which is the flip; then the old one is deleted.
So a kill or a power cut leaves the old or the new, and leftovers, which are deleted when the store is opened.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from appliance.core.errors import StorageError
from appliance.retrieval.vectors.generation import BuiltIndex, Generation, GenerationFacts, write_index

LOGGER = logging.getLogger("appliance.retrieval")

SPARE_BYTES = 64 * 1024 * 1024
"""Left free on the disk for databases and logs."""

_MANIFEST = "manifest.json"
_FORMAT = 1
_CHUNK_BYTES = 1024 * 1024
_MOST_MANIFEST_BYTES = 64 * 1024
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which generation holds."""

    format: int
    name: str
    sha256: str
    size: int
    facts: GenerationFacts


class DamagedError(Exception):
    """A file is not what was written; it says how. It never leaves the room."""


class StoreFolder:
    """The folder of one store. One thread at a time may write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> Generation | None:
        """Open the generation that holds, after every byte was checked; delete leftovers.

        Returns:
            None when there is none, or it is damaged, which is logged: it has to be made anew.
        """
        try:
            manifest = self.check()
            generation = None if manifest is None else self.open(manifest)
        except (DamagedError, StorageError) as error:
            LOGGER.warning("The index in %s is made anew from the database: %s", self.path, error)
            self._remove_all_but([])
            return None
        self._remove_all_but([_MANIFEST, f"{manifest.name}.vectors"] if manifest else [])
        return generation

    def check(self) -> Manifest | None:
        """Read all files; return the manifest, or None if there is none.

        Raises:
            DamagedError: A byte is not as written, or a file is missing.
        """
        try:
            with (self.path / _MANIFEST).open("rb") as file:
                content = file.read(_MOST_MANIFEST_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedError(f"{_MANIFEST} cannot be read: {error.strerror}.") from error
        manifest = _decode(content)
        name = f"{manifest.name}.vectors"
        try:
            size, found = _sha256(self.path / name)
        except OSError as error:
            raise DamagedError(f"{name} cannot be read: {error.strerror}.") from error
        if (size, found) != (manifest.size, manifest.sha256):
            raise DamagedError(f"{name} is not what was written: {size:,} of {manifest.size:,} bytes, SHA-256 {found}.")
        return manifest

    def open(self, manifest: Manifest) -> Generation:
        """Map a generation whose bytes are known to be right. Raises StorageError."""
        return Generation(self.path / f"{manifest.name}.vectors", manifest.facts)

    def write(self, built: BuiltIndex, model: str) -> Manifest:
        """Write a generation beside the one that holds; when this returns it survives a power cut.

        Raises:
            StorageError: The disk is full or failed; nothing is left of it.
        """
        name = secrets.token_hex(16)
        partial, final = self.path / f"{name}.partial", self.path / f"{name}.vectors"
        with self._storage_errors():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._require_space(len(built.ids) * (built.index.d + 16))
            try:
                manifest = _write_synced(partial, name, built, model)
                partial.rename(final)
                _sync_folder(self.path)
            except BaseException:
                for path in (partial, final):
                    with suppress(OSError):
                        path.unlink(missing_ok=True)
                raise
        return manifest

    def flip(self, manifest: Manifest) -> None:
        """Let a written generation hold, and delete the one before.

        Raises:
            StorageError: The disk is full or failed; the one before holds.
        """
        body = msgspec.json.encode(manifest)
        content = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
        partial = self.path / f"{_MANIFEST}.partial"
        with self._storage_errors():
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.path / _MANIFEST)
            _sync_folder(self.path)
        self._remove_all_but([_MANIFEST, f"{manifest.name}.vectors"])

    def clear(self) -> None:
        """Delete all files, for good even if the power fails next, and the folder.

        Raises:
            StorageError: They cannot be deleted.
        """
        with self._storage_errors(), suppress(FileNotFoundError):
            (self.path / _MANIFEST).unlink(missing_ok=True)
            self._remove_all_but([])
            self.path.rmdir()
            _sync_folder(self.path.parent)

    def _remove_all_but(self, kept: list[str]) -> None:
        with self._storage_errors(), suppress(FileNotFoundError):
            leftovers = [path for path in self.path.iterdir() if path.name not in kept]
            for path in leftovers:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            if leftovers:
                _sync_folder(self.path)

    def _require_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.path).free
        if needed + SPARE_BYTES > free:
            raise StorageError(
                f"The disk of {self.path} is too full to write an index: {needed:,} bytes are needed and "
                f"{SPARE_BYTES:,} in reserve, {free:,} are free.",
                advice="Make room; until then searches use the index as it is.",
                code="disk_full",
            )

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"The index in {self.path} cannot be written: {error.strerror or error}.",
                advice="Check that the disk is sound and has room, and that the folder belongs to this user.",
                code="disk_full" if error.errno in _NO_SPACE else None,
            ) from error
        except RuntimeError as error:
            raise StorageError(f"faiss cannot write the index in {self.path}: {error}.") from error


def _write_synced(path: Path, name: str, built: BuiltIndex, model: str) -> Manifest:
    digest = hashlib.sha256()
    with path.open("xb", buffering=_CHUNK_BYTES) as file:

        def write(piece: bytes) -> None:
            file.write(piece)
            digest.update(piece)

        facts = write_index(built, model, write)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return Manifest(format=_FORMAT, name=name, sha256=digest.hexdigest(), size=size, facts=facts)


def _decode(content: bytes) -> Manifest:
    digest, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise DamagedError(f"{_MANIFEST} is not what was written.")
    try:
        manifest = msgspec.json.decode(body, type=Manifest)
    except msgspec.DecodeError as error:
        raise DamagedError(f"{_MANIFEST} is of another version: {error}.") from error
    if manifest.format != _FORMAT:
        raise DamagedError(f"{_MANIFEST} is of format {manifest.format}, not {_FORMAT}.")
    return manifest


def _sha256(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
