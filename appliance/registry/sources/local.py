"""A file from this machine: a disk, a memory stick, a network share that is mounted."""

from __future__ import annotations

import os
from pathlib import Path

from appliance.core.errors import InvalidRequestError, NotFoundError, SourceError
from appliance.registry.blobs import Partial
from appliance.registry.files import CHUNK_BYTES, Progress, no_progress, open_regular, storage_errors


def find(path: Path, names: tuple[str, ...]) -> Path:
    """Return the file itself, or the first of `names` that there is in the folder.

    Raises:
        SourceError: There is none.
    """
    with storage_errors(path):
        if not path.is_dir():
            return path
        for name in names:
            if (path / name).is_file():
                return path / name
    raise SourceError(f"The folder {path} has no file {names[0]}.")


def copy(path: Path, partial: Partial, size: int, *, progress: Progress = no_progress) -> None:
    """Fill the partial file with a file of exactly `size` bytes.

    Raises:
        SourceError: There is no such file, or it has another size.
        StorageError: The disk is full, or one of the two failed.
    """
    try:
        source = open_regular(path)
    except (NotFoundError, InvalidRequestError) as error:
        raise SourceError(error.message, advice=error.advice) from error
    with storage_errors(path), source:
        found = os.fstat(source.fileno()).st_size
        if found != size:
            raise SourceError(f"The file {path} has {found:,} bytes, not {size:,}.")
        partial.restart()
        while chunk := source.read(CHUNK_BYTES):
            if partial.size + len(chunk) > size:
                raise SourceError(f"The file {path} grew while it was copied.")
            partial.append(chunk)
            progress("copying", partial.size, size)
