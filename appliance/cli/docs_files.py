"""Which files `appliance docs add` sends: those that are named, and those in folders that are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from appliance.core.errors import InvalidRequestError

LONGEST_PATH = 512
"""What an attribute holds."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that may be sent.

    Attributes:
        path: Where it lies.
        name: What it is called in the store: its path from the folder that was named, that folder included.
    """

    path: Path
    name: str

    def sha256(self) -> str:
        """Return the SHA-256 of its content.

        Raises:
            InvalidRequestError: It cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InvalidRequestError(f"{self.path} cannot be read: {error.strerror}.", param="path") from error


def candidates(paths: Iterable[Path]) -> list[Candidate]:
    """Return the files among paths and in folders among them; hidden ones and links in folders are left out.

    Raises:
        InvalidRequestError: A path is neither file nor folder, or a folder cannot be read.
    """
    found: dict[str, Candidate] = {}
    for path in paths:
        for each in _files(path):
            found.setdefault(each.name, each)
    return list(found.values())


def _files(path: Path) -> Iterator[Candidate]:
    if path.is_file():
        yield _candidate(path, path.name)
    elif path.is_dir():
        top = path.resolve()
        for folder, folders, names in os.walk(top, onerror=_refuse):
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            for name in sorted(names):
                file = Path(folder) / name
                if not name.startswith(".") and file.is_file() and not file.is_symlink() and file.stat().st_size:
                    yield _candidate(file, str(file.relative_to(top.parent)))
    else:
        raise InvalidRequestError(f"{path} is neither a file nor a folder.", param="path")


def _candidate(path: Path, name: str) -> Candidate:
    name = os.fsencode(name).decode("utf-8", "replace")
    return Candidate(path, name[-LONGEST_PATH:])


def _refuse(error: OSError) -> None:
    raise InvalidRequestError(f"{error.filename} cannot be read: {error.strerror}.", param="path") from error
