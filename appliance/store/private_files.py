"""Small files of the owner's alone, whole or not there: keys, certificates, and what goes with them.

Whoever is killed, or loses power, at any moment finds the old content or the new one, never a part of either.
"""

from __future__ import annotations

from pathlib import Path

from appliance.core.errors import NotFoundError, StorageError
from appliance.store.files import open_regular, storage_errors, sync_folder, write_durably


def write_file(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write a whole file so that it survives a power cut once this returns; its folder is made if need be (0700).

    Raises:
        StorageError: The disk or the rights do not allow it; what was there before is still there.
    """
    with storage_errors(path):
        if not path.parent.exists():
            path.parent.mkdir(mode=0o700, parents=True)
            sync_folder(path.parent.parent)
    write_durably(path, content, mode=mode)


def read_file(path: Path, *, most_bytes: int = 1024 * 1024) -> bytes | None:
    """Return the content, or None if there is no such file.

    Raises:
        InvalidRequestError: It is no regular file, or may not be read.
        StorageError: It is larger than it may be, or the disk failed.
    """
    try:
        with storage_errors(path), open_regular(path) as file:
            content = file.read(most_bytes + 1)
    except NotFoundError:
        return None
    if len(content) > most_bytes:
        raise StorageError(f"{path} is larger than {most_bytes:,} bytes.", advice="It is not what it should be.")
    return content


def rename_file(source: Path, target: Path) -> None:
    """Put a file in another's place within one folder; durable when this returns.

    Raises:
        StorageError: It cannot be; both are as they were.
    """
    with storage_errors(source):
        source.replace(target)
        sync_folder(target.parent)


def remove_file(path: Path) -> None:
    """Remove a file if it is there; durable when this returns.

    Raises:
        StorageError: It cannot be removed.
    """
    with storage_errors(path):
        if path.exists() or path.is_symlink():
            path.unlink(missing_ok=True)
            sync_folder(path.parent)


def sweep_unfinished(folder: Path) -> None:
    """Remove what killed writers left behind; for the one program that writes to the folder.

    Raises:
        StorageError: It cannot be removed.
    """
    with storage_errors(folder):
        for path in folder.glob(".*.*"):
            path.unlink(missing_ok=True)
