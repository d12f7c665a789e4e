"""The signed repository's folder: each change is a new generation of the metadata, and one rename makes it count.

    targets/…                        signed files, the digest in their names; written before anything names them
    generations/<n>/                 all metadata of a generation: roots, timestamp, the newest snapshots and targets
    metadata -> generations/<n>      the one that counts
    lock                             held by whoever changes something

Whoever is killed on the way leaves the old generation or the new one. Snapshots are consistent: a device that began to
read one generation finds its files in the next ones too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from appliance.core.errors import ConflictError, NotFoundError
from appliance.security.metadata import METADATA, TARGETS
from appliance.store.files import storage_errors, sync_folder, write_durably
from appliance.store.locks import Hold, lock

_WAIT_S = 30.0
_VERSIONS_KEPT = 3
_GENERATIONS_KEPT = 2
_VERSIONED = re.compile(r"(\d+)\.(root|snapshot|targets)\.json")


class Repository:
    """Owns the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._link = folder / METADATA
        self._generations = folder / "generations"

    @property
    def exists(self) -> bool:
        """Return True once something was published."""
        return self._link.exists()

    @property
    def generation(self) -> str:
        """Return the name of the generation that counts: it changes with every change; "" if there is none."""
        try:
            return str(self._link.readlink())
        except FileNotFoundError:
            return ""

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Keep other processes from changing anything meanwhile.

        Raises:
            ConflictError: Another one has been at it for half a minute.
        """
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = lock(self.folder / "lock", os.O_RDWR | os.O_CREAT, exclusive=True, wait_s=_WAIT_S)
            except BlockingIOError as error:
                raise ConflictError(
                    "Another process is changing the signed repository.", advice="Wait for it, and try again."
                ) from error
        with Hold([descriptor]):
            yield

    def metadata(self) -> dict[str, bytes]:
        """Return every file of the generation that counts.

        Raises:
            NotFoundError: There is no repository yet.
        """
        if not self.exists:
            raise NotFoundError(
                f"There is no signed repository in {self.folder}.", advice="`appliance hub init` makes one."
            )
        with storage_errors(self.folder):
            folder = self._link.resolve()
            return {each.name: each.read_bytes() for each in sorted(folder.iterdir())}

    def publish(self, metadata: Mapping[str, bytes], targets: Mapping[str, bytes]) -> None:
        """Make metadata count, in place of what has the same names; call it within `changing`.

        Args:
            metadata: New files by their names.
            targets: New signed files by their path in the repository, which begins with `targets/`.

        Raises:
            StorageError: The disk is full or failed; what counted before counts still.
        """
        for path, data in targets.items():
            self._write_target(self.folder / path, data)
        with storage_errors(self.folder):
            number, kept = self._current()
            folder = self._generations / f"{number + 1:08d}"
            if folder.exists():  # of someone who was killed before it counted
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            for name in sorted(_newest(kept.keys() | metadata.keys())):
                if name in metadata:
                    write_durably(folder / name, metadata[name])
                else:
                    os.link(kept[name], folder / name)
            sync_folder(folder)
            sync_folder(self._generations)
            sync_folder(self.folder)
            self._switch(folder)
            self._forget(number + 1)

    def _write_target(self, path: Path, data: bytes) -> None:
        with storage_errors(path):
            for folder in reversed(path.parents):
                if not folder.exists():
                    folder.mkdir()
                    sync_folder(folder.parent)
        write_durably(path, data)

    def _current(self) -> tuple[int, dict[str, Path]]:
        if not self.exists:
            return 0, {}
        folder = self._link.resolve()
        return int(folder.name), {each.name: each for each in folder.iterdir()}

    def _switch(self, folder: Path) -> None:
        new = self.folder / f".{METADATA}.new"
        new.unlink(missing_ok=True)
        new.symlink_to(folder.relative_to(self.folder))
        new.replace(self._link)
        sync_folder(self.folder)

    def _forget(self, newest: int) -> None:
        for each in self._generations.iterdir():
            if not newest - _GENERATIONS_KEPT < int(each.name) <= newest:
                shutil.rmtree(each)

    def remove_unsigned(self, signed: frozenset[str]) -> None:
        """Delete files below `targets/` that no metadata names any more; call it within `changing`.

        Args:
            signed: The paths in the repository that are to stay.
        """
        with storage_errors(self.folder):
            for each in (self.folder / TARGETS).rglob("*"):
                if each.is_file() and str(each.relative_to(self.folder)) not in signed:
                    each.unlink()


def _newest(names: set[str]) -> set[str]:
    """Return the names that a generation keeps: all roots, and the newest versions of what changes often."""
    versions: dict[str, list[int]] = {"snapshot": [], "targets": []}
    for name in names:
        match = _VERSIONED.fullmatch(name)
        if match and match[2] in versions:
            versions[match[2]].append(int(match[1]))
    old = {f"{each}.{role}.json" for role, found in versions.items() for each in sorted(found)[:-_VERSIONS_KEPT]}
    return names - old
