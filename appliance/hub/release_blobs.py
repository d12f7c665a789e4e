"""Model files on the hub, by their SHA-256: `blobs/sha256-<hex>`, read-only, each whole from the moment it is there."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from appliance.core.errors import InvalidRequestError, StorageError, UntrustedError
from appliance.core.fleet import PIECE_BYTES
from appliance.store.files import Progress, free_bytes, no_progress, open_regular, storage_errors, sync_folder
from appliance.store.locks import Hold, lock

_LOCK = ".lock"
_WAIT_S = 30.0
SPARE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in the folder.

    Attributes:
        digest: SHA-256 of the whole, in hex.
        length: In bytes.
        pieces: SHA-256 of each piece of 1 MiB, in order, one behind the other.
    """

    digest: str
    length: int
    pieces: bytes


class ReleaseBlobs:
    """Owns the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, digest: str) -> Path:
        """Return where a file is or would be."""
        return self.folder / f"sha256-{digest}"

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Keep files from being removed that no release has yet."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = lock(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, exclusive=False, wait_s=_WAIT_S)
        with Hold([descriptor]):
            yield

    def store(self, source: Path, expected: tuple[str, int] | None, progress: Progress = no_progress) -> StoredFile:
        """Copy a file in.

        Args:
            source: A file on this machine.
            expected: SHA-256 and length that it has to have, or None.
            progress: Told of each piece.

        Raises:
            NotFoundError: There is no such file.
            UntrustedError: It is another file than expected.
            StorageError: The disk is full or failed; nothing half made has a file's name.
        """
        with storage_errors(source), open_regular(source) as file:
            length = file.seek(0, 2)
            if not length:
                raise InvalidRequestError(f"The file {source} is empty.")
            self._require_space(length)
            with storage_errors(self.folder):
                return self._copy(file, source, length, expected, progress)

    def _copy(
        self, file: BinaryIO, source: Path, length: int, expected: tuple[str, int] | None, progress: Progress
    ) -> StoredFile:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=".coming-")
        try:
            with os.fdopen(descriptor, "wb") as copy:
                stored = _hashed(file, length, source.name, progress, copy)
                if expected is not None and expected != (stored.digest, stored.length):
                    raise UntrustedError(
                        f"{source} has {stored.length:,} bytes with SHA-256 {stored.digest:.12}…, and the manifest "
                        f"says {expected[1]:,} with {expected[0]:.12}….",
                        advice="It is another file, or a damaged one: fetch it anew.",
                        code="wrong_content",
                    )
                os.fchmod(copy.fileno(), 0o444)
                copy.flush()
                os.fsync(copy.fileno())
            Path(name).replace(self.path(stored.digest))
        finally:
            Path(name).unlink(missing_ok=True)
        sync_folder(self.folder)
        return stored

    def _require_space(self, length: int) -> None:
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            free = free_bytes(self.folder)
        if length + SPARE_BYTES > free:
            raise StorageError(
                f"The disk of {self.folder} is too full: {length:,} bytes are needed and {SPARE_BYTES:,} in reserve, "
                f"{free:,} are free.",
                advice="Make room, for example by `appliance hub releases withdraw`.",
                code="disk_full",
            )

    def hashed(self, digest: str, progress: Progress = no_progress) -> StoredFile:
        """Read a file and return what it is now.

        Raises:
            NotFoundError: It is not there.
        """
        path = self.path(digest)
        with storage_errors(path), open_regular(path) as file:
            return _hashed(file, file.seek(0, 2), path.name, progress)

    def remove_unused(self, find_used: Callable[[], frozenset[str]]) -> int:
        """Delete every file that no release has, unless somebody is adding one; return the bytes that this freed.

        Args:
            find_used: Returns the digests of all releases; asked while nobody can add one.
        """
        freed = 0
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = lock(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, exclusive=True)
            except BlockingIOError:
                return 0
            with Hold([descriptor]):
                used = find_used()
                for each in sorted(self.folder.iterdir()):
                    if each.name != _LOCK and each.name.removeprefix("sha256-") not in used:
                        freed += each.stat().st_size
                        each.unlink()
        return freed


def _hashed(file: BinaryIO, length: int, name: str, progress: Progress, copy: BinaryIO | None = None) -> StoredFile:
    whole, pieces, done = hashlib.sha256(), bytearray(), 0
    for piece in _pieces(file):
        whole.update(piece)
        pieces += hashlib.sha256(piece).digest()
        if copy is not None:
            copy.write(piece)
        done += len(piece)
        progress(f"reading {name}", done, length)
    return StoredFile(whole.hexdigest(), done, bytes(pieces))


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while piece := file.read(PIECE_BYTES):
        yield piece
