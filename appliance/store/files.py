"""Small files that must be whole after a power cut: keys, certificates, configurations."""

from __future__ import annotations

import os
from pathlib import Path

from appliance.core.errors import StorageError


def write_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace a file at once and durably: a reader finds the old or the new one, never a part.

    Args:
        path: In a folder that is there.
        data: All of it.
        private: Only this user may read it (mode 0600), from its first byte on; otherwise everybody (0644).

    Raises:
        StorageError: It cannot be written; what was there is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600 if private else 0o644)
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"The file {path} could not be written: {error.strerror}.") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
