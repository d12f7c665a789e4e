"""Files of this room: written through to the disk, with errors that give figures."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from appliance.core.errors import StorageError

SPARE_BYTES = 64 * 1024 * 1024
"""Left free on the disk for databases and logs."""


def sync_folder(folder: Path) -> None:
    """Make names that were added to or removed from the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError on `path` into a StorageError; a full disk's has the figures."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise _full(path.parent, shutil.disk_usage(path.parent).free) from error
        raise StorageError(
            f"The file {path} cannot be read or written: {error.strerror}.",
            advice="`appliance doctor` looks at the disk, the rights and the file.",
        ) from error


def require_space(folder: Path, needed: int) -> None:
    """Check that the folder's disk has room. Raises StorageError."""
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise _full(folder, free)


def _full(folder: Path, free: int) -> StorageError:
    return StorageError(
        f"The disk of {folder} is too full for the file: {free / 1e6:,.1f} MB are free, "
        f"and {SPARE_BYTES / 1e6:,.1f} MB are kept in reserve.",
        advice="Make room, for example by deleting files, or name another folder with --data.",
        code="disk_full",
    )
