"""The desk where a person's wish to import a folder is handed over to the process that speaks for this box.

    <id>.json     the request; the verb writes it, the agent removes it when it is over
    <id>.answer   how far it is; the agent writes it, the verb removes it when it has told the person

Each file has one writer and is whole or not there, so neither end needs the other to be running.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec import Meta, Struct

from appliance.core.errors import ApplianceError
from appliance.core.fleet import Job, Name
from appliance.store.files import storage_errors
from appliance.store.private_files import read_file, remove_file, write_file

S = TypeVar("S", bound=Struct)

_FILE = re.compile(r"([0-9a-f]{32})\.(json|answer)")
KEPT_S = 86_400.0
"""For how long an answer that nobody fetched stays."""


class ImportRequest(Struct, frozen=True):
    """What a person wants imported.

    Attributes:
        folder: With the signed repository and the files, as `hub releases export` makes it.
        model: The model's name; None if the folder has only one.
        expires: Unix seconds after which it is tried no more.
        force: Try a release again that failed its trial here.
    """

    folder: Annotated[str, Meta(min_length=1, max_length=4096)]
    model: Name | None = None
    expires: float = 0.0
    force: bool = False


class ImportAnswer(Struct, frozen=True):
    """How far an import is.

    Attributes:
        state: Of the job; "" if it did not come so far.
        over: Nothing more will be told.
        installed: It is over and well: the release is on trial, or is what the box runs.
        model: The release's.
        version: The release's.
        percent: How much of the files is here.
        code: Stable slug of the trouble, or "".
        detail: The trouble, for a person.
        advice: What to do about it, or "".
    """

    state: str = ""
    over: bool = False
    installed: bool = False
    model: str = ""
    version: str = ""
    percent: int = 0
    code: str = ""
    detail: str = ""
    advice: str = ""


class ImportDesk:
    """A folder with requests and answers."""

    def __init__(self, folder: Path) -> None:
        """Use this folder, which is made when it is needed."""
        self._folder = folder

    def hand_in(self, request: ImportRequest) -> str:
        """Write a request and return its id; durable when this returns."""
        name = uuid.uuid4().hex
        write_file(self._folder / f"{name}.json", msgspec.json.encode(request))
        return name

    def requests(self) -> Sequence[str]:
        """Return the ids of the requests, the oldest first.

        Raises:
            StorageError: The folder cannot be read.
        """
        return [path.stem for path in self._files("json")]

    def request(self, name: str) -> ImportRequest | None:
        """Return a request; None if there is none, or what is there is no request."""
        return self._read(f"{name}.json", ImportRequest)

    def reply(self, name: str, answer: ImportAnswer) -> None:
        """Write how far a request is. One that is over is removed, after its answer is on the disk."""
        write_file(self._folder / f"{name}.answer", msgspec.json.encode(answer))
        if answer.over:
            remove_file(self._folder / f"{name}.json")

    def answer(self, name: str) -> ImportAnswer | None:
        """Return the answer to a request, or None if there is none yet."""
        return self._read(f"{name}.answer", ImportAnswer)

    def clear(self, name: str) -> None:
        """Remove what there is of a request."""
        remove_file(self._folder / f"{name}.json")
        remove_file(self._folder / f"{name}.answer")

    def tidy(self, now: float) -> None:
        """Remove old answers that nobody fetched."""
        for path in self._files("answer"):
            if _modified(path) < now - KEPT_S:
                remove_file(path)

    def _files(self, kind: str) -> list[Path]:
        with storage_errors(self._folder):
            if not self._folder.is_dir():
                return []
            paths = [path for path in self._folder.glob(f"*.{kind}") if _FILE.fullmatch(path.name)]
            return sorted(paths, key=lambda path: (_modified(path), path.name))

    def _read(self, name: str, kind: type[S]) -> S | None:
        try:
            content = read_file(self._folder / name)
            return None if content is None else msgspec.json.decode(content, type=kind)
        except (ApplianceError, msgspec.DecodeError):
            return None


def _modified(path: Path) -> float:
    """Return when a file was written, in Unix seconds; 0 if the other end has removed it meanwhile."""
    with storage_errors(path):
        try:
            return path.stat().st_mtime
        except FileNotFoundError:
            return 0.0


def from_folder(job: Job, folder: Path) -> Job:
    """Return a job of this box itself, with the folder that its files are in."""
    return msgspec.structs.replace(job, mirrors=(folder.as_uri(),))


def folder_of(job: Job) -> Path:
    """Return the folder of a job of this box itself."""
    return Path(unquote(urlsplit(job.mirrors[0]).path))
