"""The files of a signed repository, read in slices: by the hub for its devices, by a device from a folder it was given.

Only names that a repository has are looked at, and no link leads out of its folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from appliance.core.fleet import BLOCK_BYTES, Answer
from appliance.store.files import open_regular, storage_errors

_NAME = re.compile(r"(?:metadata|targets)(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,200}){1,8}")


def read_slice(folder: Path, path: str, offset: int, *, now: float = 0.0) -> Answer:
    """Return at most `BLOCK_BYTES` of a file of the repository, from `offset` on.

    Args:
        folder: Of the repository.
        path: As the question has it, hostile.
        offset: In bytes; what is behind the end is empty.
        now: Unix seconds for the answer; 0 if nobody here knows the time.

    Raises:
        StorageError: The disk failed.
    """
    missing = Answer(ok=False, now=now, code="not_found", detail=f"The signed repository has no file {path!r:.200}.")
    if not _NAME.fullmatch(path):
        return missing
    with storage_errors(folder):
        real = (folder / path).resolve()
        if not real.is_relative_to(folder.resolve()) or not real.is_file():
            return missing
        with open_regular(real) as file:
            total = file.seek(0, 2)
            file.seek(min(offset, total))
            return Answer(ok=True, data=file.read(BLOCK_BYTES), total=total, now=now)
