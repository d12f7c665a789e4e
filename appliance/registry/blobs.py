"""Content-addressed model files: `blobs/sha256-<hex>`, read-only, each whole and right from the moment it is there.

    partial/sha256-<hex>        being fetched; locked by the process that fetches; survives a kill, and is gone on with
    partial/sha256-<hex>.etag   which edition of which address the partial file came from
    partial/import-…            being copied in; its hash is not known yet; worthless without its process
    partial/pip-<hex>/          where pip puts a wheel that only it can fetch
    blobs/sha256-<hex>          hash checked, on the disk, then renamed here; locked, shared, while it is loaded

A partial file keeps its lock while it is renamed to a blob, until its model is registered. So an unlocked blob that
no registered model uses is garbage from a crash, and may go at any time.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self

import msgspec

from appliance.core.errors import ConflictError, NotFoundError, StorageError
from appliance.registry.files import free_bytes, storage_errors, sync_folder
from appliance.store.locks import Hold, holders, lock, share

SPARE_BYTES = 64 * 1024 * 1024
"""Left free on the disk for databases and logs."""

STALE_PARTIAL_S = 7 * 86_400
"""Age of the last write after which a partial file is not worth going on with."""

_HOLD_WAIT_S = 5.0
_PUBLISH_WAIT_S = 60.0
_SWEEP_WAIT_S = 0.5
_IMPORT = "import-"


class Edition(msgspec.Struct, frozen=True):
    """Where a partial file's bytes came from, so that a changed file is not appended to an old one."""

    url: str
    etag: str


class Blobs:
    """Owns the folder of blobs and, beside it, the folder of partial downloads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial_folder = folder.parent / "partial"

    def path(self, sha256: str) -> Path:
        """Return where the blob is or would be."""
        return self.folder / f"sha256-{sha256}"

    def has(self, sha256: str, size: int) -> bool:
        """Tell whether the blob is there in its full size. Its content was checked when it was published."""
        try:
            return self.path(sha256).stat(follow_symlinks=False).st_size == size
        except FileNotFoundError:
            return False

    def hold(self, digests: Iterable[str]) -> Hold:
        """Keep blobs from being removed.

        Raises:
            NotFoundError: One is not there.
            ConflictError: Another process is just removing one.
        """
        descriptors: list[int] = []
        try:
            descriptors.extend(self._lock_blob(digest) for digest in digests)
        except BaseException:
            Hold(descriptors).close()
            raise
        return Hold(descriptors)

    def _lock_blob(self, digest: str) -> int:
        path = self.path(digest)
        with storage_errors(path):
            try:
                return lock(path, os.O_RDONLY, exclusive=False, wait_s=_HOLD_WAIT_S)
            except FileNotFoundError as error:
                raise NotFoundError(
                    f"The model file {path} is missing.", advice="Remove the model and pull it again."
                ) from error
            except BlockingIOError as error:
                raise ConflictError(f"The model file {path} is being removed.", advice="Try again.") from error

    @contextmanager
    def exclusively(self, digests: Iterable[str]) -> Iterator[None]:
        """Keep everyone from loading these blobs; those that are missing do not matter.

        Raises:
            ConflictError: A process has one loaded; the message names the process.
        """
        descriptors: list[int] = []
        try:
            for digest in sorted(set(digests)):  # two files of a model may have the same bytes
                with storage_errors(self.path(digest)):
                    descriptors += self._lock_exclusively(digest)
            yield
        finally:
            Hold(descriptors).close()

    def _lock_exclusively(self, digest: str) -> list[int]:
        path = self.path(digest)
        try:
            return [lock(path, os.O_RDONLY, exclusive=True)]
        except FileNotFoundError:
            return []
        except BlockingIOError as error:
            by = ", ".join(f"process {each}" for each in holders(path)) or "another process"
            raise ConflictError(
                f"The model's file is in use by {by}.",
                advice="Stop that server, or let it load another model, and try again.",
                code="model_in_use",
            ) from error

    def partial(self, sha256: str) -> Partial:
        """Open the partial download of a file and lock it; close it when done.

        Raises:
            ConflictError: Another process is fetching the same file.
        """
        return Partial(self, f"sha256-{sha256}")

    def unnamed_partial(self) -> Partial:
        """Open a partial file for content whose hash is not known yet; it is gone when it is closed unpublished."""
        return Partial(self, f"{_IMPORT}{os.getpid()}-{time.monotonic_ns()}")

    def require_space(self, needed: int, purpose: str) -> None:
        """Check that the disk has room before anything is written.

        Raises:
            StorageError: It has not; the message has both figures.
        """
        with storage_errors(self.partial_folder):
            self.partial_folder.mkdir(parents=True, exist_ok=True)
            free = free_bytes(self.partial_folder)
        if needed + SPARE_BYTES > free:
            raise StorageError(
                f"The disk of {self.folder.parent} is too full to {purpose}: {megabytes(needed)} are needed and "
                f"{megabytes(SPARE_BYTES)} in reserve, {megabytes(free)} are free.",
                advice="Make room, for example with `appliance models remove`, or name another folder with --data.",
                code="disk_full",
            )

    def remove_unused(self, is_used: Callable[[str], bool]) -> int:
        """Delete every blob that no model uses and no process has locked; return the bytes that this freed.

        Args:
            is_used: Asked about a hash while its blob is locked.
        """
        freed = 0
        with storage_errors(self.folder):
            for path in sorted(self.folder.glob("sha256-*")):
                digest = path.name.removeprefix("sha256-")
                if not is_used(digest):
                    freed += _remove_unless(path, partial(is_used, digest))
        return freed

    def remove_stale_partials(self) -> None:
        """Delete partial downloads nobody has gone on with for `STALE_PARTIAL_S`, and imports whose process is gone."""
        with storage_errors(self.partial_folder):
            oldest = time.time() - STALE_PARTIAL_S
            for path in sorted(self.partial_folder.glob("*")):
                with suppress(FileNotFoundError):  # its process has finished with it since
                    _remove_if_stale(path, oldest)


def _remove_if_stale(path: Path, oldest: float) -> None:
    is_stale = path.stat().st_mtime < oldest
    if path.is_dir() and is_stale:
        shutil.rmtree(path)
    elif path.is_file() and (is_stale or path.name.startswith(_IMPORT)):
        _remove_unless(path, lambda: False)


def _remove_unless(path: Path, is_used: Callable[[], bool]) -> int:
    """Delete a file that nobody has locked and return the bytes this freed; `is_used` is asked while it is locked."""
    try:
        descriptor = lock(path, os.O_RDONLY, exclusive=True)
    except (FileNotFoundError, BlockingIOError):
        return 0  # gone, or someone is at it
    with Hold([descriptor]):
        if is_used():
            return 0
        size = os.fstat(descriptor).st_size
        path.unlink()
        sync_folder(path.parent)
        return size


class Partial:
    """A file on its way to become a blob, locked by this process. A context manager; leaving keeps what was written."""

    def __init__(self, blobs: Blobs, name: str) -> None:
        self._blobs = blobs
        self.path = blobs.partial_folder / name
        self._edition_path = self.path.with_name(f"{name}.etag")
        with storage_errors(self.path):
            blobs.partial_folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = lock(self.path, os.O_RDWR | os.O_CREAT, exclusive=True, wait_s=_SWEEP_WAIT_S)
            except BlockingIOError as error:
                by = ", ".join(f"process {each}" for each in holders(self.path)) or "another process"
                raise ConflictError(
                    f"The same file is being fetched by {by}.", advice="Wait for it, then repeat the command."
                ) from error
        self.file = os.fdopen(descriptor, "r+b", buffering=0)
        self._published = Hold([])

    @property
    def size(self) -> int:
        """Return how many bytes there are."""
        return os.fstat(self.file.fileno()).st_size

    def append(self, chunk: bytes) -> None:
        """Write at the end.

        Raises:
            StorageError: The disk is full or failed; what was written before stays.
        """
        with storage_errors(self.path):
            self.file.seek(0, os.SEEK_END)
            view = memoryview(chunk)
            while view:
                view = view[self.file.write(view) :]

    def restart(self) -> None:
        """Drop what was written."""
        with storage_errors(self.path):
            self.file.truncate(0)
            self._edition_path.unlink(missing_ok=True)

    @property
    def edition(self) -> Edition | None:
        """Return where the bytes so far came from, if that was noted."""
        try:
            return msgspec.json.decode(self._edition_path.read_bytes(), type=Edition)
        except (OSError, msgspec.DecodeError):
            return None  # a missing or torn note only costs the comparison; the hash decides in the end

    @edition.setter
    def edition(self, edition: Edition) -> None:
        with storage_errors(self._edition_path):
            self._edition_path.write_bytes(msgspec.json.encode(edition))

    def publish(self, sha256: str) -> None:
        """Make this the blob `sha256`, whose content the caller has checked. Keeps it from removal until `close`.

        Raises:
            ConflictError: There is a cut-off blob of that name, and a process has it loaded.
        """
        target = self._blobs.path(sha256)
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.fsync(self.file.fileno())
            with Hold([lock(self._blobs.partial_folder, os.O_RDONLY, exclusive=True, wait_s=_PUBLISH_WAIT_S)]):
                if self._blobs.has(sha256, self.size):  # published meanwhile, under this or another model's name
                    self._published = self._blobs.hold([sha256])
                    self.path.unlink()
                else:
                    with self._blobs.exclusively([sha256]):
                        self.path.rename(target)
                    os.fchmod(self.file.fileno(), 0o444)
                    share(self.file.fileno())
            sync_folder(target.parent)
            sync_folder(self.path.parent)
            self._edition_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete the partial file and close it."""
        with storage_errors(self.path):
            self.path.unlink(missing_ok=True)
            self._edition_path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Release the lock; what was written stays for the next attempt. Idempotent."""
        self.file.close()
        self._published.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        is_unnamed = self.path.name.startswith(_IMPORT)
        if not self.file.closed and (is_unnamed or self.size == 0):
            self.discard()
        self.close()


def megabytes(count: int) -> str:
    """Return a size as a person reads it, in decimal megabytes as disks are sold."""
    return f"{count / 1e6:,.1f} MB"
