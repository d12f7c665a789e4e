"""Small files that are whole or not there: written beside their place, flushed to the disk, then renamed.

Whoever is killed, or loses power, at any moment finds the old content or the new one, never a part of either.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from appliance.core.errors import StorageError

PRIVATE = 0o600
PUBLIC = 0o644

_UNFINISHED = ".unfinished-"


def write_file(path: Path, content: bytes, *, mode: int = PRIVATE) -> None:
    """Write a whole file so that it survives a power cut once this returns.

    Args:
        path: Its folder is made if need be, open to its owner only.
        content: Everything.
        mode: Rights of the file.

    Raises:
        StorageError: The disk or the rights do not allow it; what was there before is still there.
    """
    with _storage_errors(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = path.with_name(f"{_UNFINISHED}{path.name}-{secrets.token_hex(6)}")
        try:
            _write_through(unfinished, content, mode)
            unfinished.rename(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def read_file(path: Path, *, most_bytes: int = 1024 * 1024) -> bytes | None:
    """Return the content, or None if there is no such file.

    Raises:
        StorageError: It cannot be read, or is larger than it may be.
    """
    with _storage_errors(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # does not wait for a pipe's writer
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise StorageError(f"{path} is larger than {most_bytes:,} bytes.", advice="It is not what it should be.")
    return content


def rename_file(source: Path, target: Path) -> None:
    """Put a file in another's place within one folder; durable when this returns.

    Raises:
        StorageError: It cannot be; both are as they were.
    """
    with _storage_errors(source):
        source.rename(target)
        sync_folder(target.parent)


def remove_file(path: Path) -> None:
    """Remove a file if it is there; durable when this returns.

    Raises:
        StorageError: It cannot be removed.
    """
    with _storage_errors(path):
        if path.exists() or path.is_symlink():
            path.unlink(missing_ok=True)
            sync_folder(path.parent)


def sweep_unfinished(folder: Path) -> None:
    """Remove what killed writers left behind; for the one program that writes to the folder.

    Raises:
        StorageError: It cannot be removed.
    """
    with _storage_errors(folder):
        for path in folder.glob(f"{_UNFINISHED}*"):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make names that were added to or removed from the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_through(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # whatever the umask says
        folder = path.parent.stat()
        if os.geteuid() == 0 and folder.st_uid != 0:
            os.fchown(descriptor, folder.st_uid, folder.st_gid)  # or the service could not read it after `sudo`
        file.write(content)
        file.flush()
        os.fsync(descriptor)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read or written: {error.strerror or error}.",
            advice="Check that the disk has room and is sound, and that the folder belongs to this user.",
        ) from error
