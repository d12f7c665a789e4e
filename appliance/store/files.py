"""Files as the rooms handle them: regular ones only, written through to the disk, with errors that give figures."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from appliance.core.errors import InvalidRequestError, NotFoundError, StorageError

CHUNK_BYTES = 1024 * 1024

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many bytes of it are done, and how many there are in all."""

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def no_progress(activity: str, done: int, total: int) -> None:
    """Report to nobody."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, or refuse it if it is a folder, a device, a pipe or a socket.

    Raises:
        NotFoundError: There is none.
        InvalidRequestError: It is no regular file, or may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # does not wait for a pipe's writer
    except FileNotFoundError as error:
        raise NotFoundError(f"There is no file {path}.") from error
    except OSError as error:
        raise InvalidRequestError(f"The file {path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidRequestError(f"{path} is not a regular file.", advice="Name a file on a disk.")
    return os.fdopen(descriptor, "rb")


def sha256_of(file: BinaryIO, progress: Progress = no_progress, activity: str = "checking") -> str:
    """Return the SHA-256 of an open file from its start, in lower-case hex."""
    total = os.fstat(file.fileno()).st_size
    digest = hashlib.sha256()
    done = 0
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
        done += len(chunk)
        progress(activity, done, total)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make names that were added to or removed from the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a whole file: whoever looks, and whenever the power goes, sees what was there before or all of the new.

    Args:
        path: Its folder must be there.
        data: All of it.
        mode: Rights of the file, from its first byte on.

    Raises:
        StorageError: The disk is full or failed; what was there before is as it was.
    """
    with storage_errors(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a whole small file as `write_durably` does, for everybody to read or, if private, for this user only."""
    write_durably(path, data, mode=0o600 if private else 0o644)


def free_bytes(folder: Path) -> int:
    """Return how many bytes this user may still write to the folder's disk."""
    return shutil.disk_usage(folder).free


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError on `path` into a StorageError; a full disk's has the figures."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StorageError(
                f"The disk is full: writing {path.name} failed with {free_bytes(path.parent):,} bytes free.",
                advice="Make room, for example with `appliance models remove`, and repeat the command.",
                code="disk_full",
            ) from error
        raise StorageError(
            f"{path} cannot be read or written: {error.strerror or error}.",
            advice="Check that the disk is sound and that the folder belongs to this user; `appliance doctor` looks.",
        ) from error
