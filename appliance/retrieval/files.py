"""Uploaded files: `files/<id>` in the data folder, on the disk before their row says that they are there.

files/.<id>.part   being uploaded; garbage once it has not been written to for an hour
files/<id>         whole; one without a row is garbage from a crash, after the same hour
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from appliance.core.clock import Clock
from appliance.core.errors import InvalidRequestError, TooLargeError
from appliance.core.retrieval import StoredFile, UploadTerms
from appliance.retrieval.disk import require_space, storage_errors, sync_folder
from appliance.retrieval.erasure import Erasure
from appliance.retrieval.parsing.sniff import sniff
from appliance.retrieval.rows import to_file
from appliance.store.database import Connection, Database
from appliance.store.rows import new_id, one, page

PIECE_BYTES = 1024 * 1024
SNIFFED_BYTES = 64 * 1024
GARBAGE_AGE_S = 3600.0
MOST_FILENAME = 1024

_OF_TENANT = "tenant = :tenant AND (expires IS NULL OR expires > :now)"


class UploadedFiles:
    """Owns the folder of files. See `core.retrieval.Files`."""

    def __init__(self, database: Database, folder: Path, most_bytes: int, clock: Clock, erasure: Erasure) -> None:
        """Keep files of up to `most_bytes` in the folder."""
        self._database = database
        self._folder = folder
        self._most_bytes = most_bytes
        self._clock = clock
        self._erasure = erasure

    async def create(
        self,
        filename: str,
        purpose: str,
        content: AsyncIterator[bytes],
        *,
        tenant: str,
        expires_after_s: int | None = None,
        terms: Callable[[], UploadTerms] | None = None,
    ) -> StoredFile:
        """Write a file to disk as it comes; see `core.retrieval.Files.create`."""
        if not 0 < len(filename) <= MOST_FILENAME or not filename.isprintable():
            raise InvalidRequestError(
                f"The file's name has {len(filename)} characters; 1 to {MOST_FILENAME} visible ones are taken.",
                param="file",
            )
        name = new_id("file-")
        part = self._folder / f".{name}.part"
        try:
            size, start = await self._receive(part, content)
            said = UploadTerms(purpose, expires_after_s) if terms is None else terms()
            media_type = await asyncio.to_thread(sniff, start, filename)
            await asyncio.to_thread(_publish, part, self._folder / name)
            now = int(self._clock.unix())
            expires = None if said.expires_after_s is None else now + said.expires_after_s
            stored = StoredFile(name, filename, said.purpose, size, media_type, now, expires)
            await self._database.write(lambda connection: _insert(connection, stored, tenant))
        except BaseException:
            await self._discard(part, self._folder / name)
            raise
        return stored

    async def _receive(self, part: Path, content: AsyncIterator[bytes]) -> tuple[int, bytes]:
        """Write what comes, and return its size and its start."""
        file = await asyncio.to_thread(_open, part)
        try:
            size = 0
            start = b""
            async for piece in _in_large_pieces(content):
                size += len(piece)
                if size > self._most_bytes:
                    raise TooLargeError(
                        f"The file has more than {self._most_bytes} bytes.",
                        advice="Split it, or raise `max_file_bytes`.",
                        code="file_too_large",
                    )
                if len(start) < SNIFFED_BYTES:
                    start = (start + piece)[:SNIFFED_BYTES]
                await asyncio.to_thread(_append, file, part, piece)
            if not size:
                raise InvalidRequestError("The file is empty.", param="file", code="empty_file")
            return size, start
        finally:
            file.close()

    async def _discard(self, *paths: Path) -> None:
        """Delete a file that did not come whole, unless its row was written all the same."""
        name = paths[-1].name
        if self._database.read(lambda each: each.execute("SELECT 1 FROM files WHERE id = ?", (name,)).fetchone()):
            return
        for path in paths:
            with storage_errors(path):
                path.unlink(missing_ok=True)

    def list(
        self, *, tenant: str, purpose: str = "", limit: int = 10_000, after: str = "", newest_first: bool = True
    ) -> tuple[Sequence[StoredFile], bool]:
        """Return files, and whether there are more."""
        values = {"tenant": tenant, "now": self._clock.unix(), "purpose": purpose}

        def read(connection: Connection) -> tuple[Sequence[StoredFile], bool]:
            key = self._row_key(connection, after, tenant) if after else None
            sql = f"SELECT * FROM files WHERE {_OF_TENANT} AND :purpose IN ('', purpose)"  # noqa: S608
            rows, more = page(
                connection, sql, {**values, "after": key}, limit=limit, newest_first=newest_first, key="key"
            )
            return [to_file(each) for each in rows], more

        return self._database.read(read)

    def _row_key(self, connection: Connection, file: str, tenant: str) -> int:
        return int(
            one(connection, "SELECT key FROM files WHERE id = ? AND tenant = ?", (file, tenant), f"file {file!r}")[0]
        )

    def get(self, file: str, *, tenant: str) -> StoredFile:
        """Return one file. Raises NotFoundError."""
        return self._database.read(lambda connection: self._get(connection, file, tenant))

    def _get(self, connection: Connection, file: str, tenant: str) -> StoredFile:
        sql = "SELECT * FROM files WHERE id = ? AND tenant = ? AND (expires IS NULL OR expires > ?)"
        return to_file(one(connection, sql, (file, tenant, self._clock.unix()), f"file {file!r}"))

    async def content(self, file: str, *, tenant: str) -> AsyncIterator[bytes]:
        """Read a file. Raises NotFoundError."""
        path = self._folder / self.get(file, tenant=tenant).id
        with storage_errors(path):
            opened = await asyncio.to_thread(path.open, "rb")
            with opened:
                while piece := await asyncio.to_thread(opened.read, PIECE_BYTES):
                    yield piece

    async def delete(self, file: str, *, tenant: str) -> None:
        """Erase a file and all that was made of it; see `core.retrieval.Files.delete`."""
        await self._erasure.erase(lambda connection: self._remove(connection, file, tenant))

    def _remove(self, connection: Connection, file: str, tenant: str) -> None:
        self._erasure.remove_file(connection, self._row_key(connection, file, tenant))

    def remove_expired(self, connection: Connection) -> int:
        """Take out what is past its time, in the caller's transaction, and return how many there were."""
        rows = connection.execute("SELECT key FROM files WHERE expires <= ? LIMIT 1000", (self._clock.unix(),))
        keys = [int(key) for (key,) in rows]
        for key in keys:
            self._erasure.remove_file(connection, key)
        return len(keys)

    def remove_garbage(self) -> None:
        """Delete what crashed uploads left."""
        with storage_errors(self._folder):
            if not self._folder.is_dir():
                return
            oldest = time.time() - GARBAGE_AGE_S
            for path in sorted(self._folder.iterdir()):
                with contextlib.suppress(FileNotFoundError):  # its upload has ended meanwhile
                    if path.stat().st_mtime < oldest and not self._has_row(path.name):
                        path.unlink()

    def _has_row(self, name: str) -> bool:
        sql = "SELECT 1 FROM files WHERE id = ? UNION ALL SELECT 1 FROM erasures WHERE file = ?"
        return self._database.read(lambda each: each.execute(sql, (name, name)).fetchone()) is not None


async def _in_large_pieces(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Join small pieces, so that not each of them costs a thread."""
    waiting = bytearray()
    async for piece in content:
        waiting += piece
        if len(waiting) >= PIECE_BYTES:
            yield bytes(waiting)
            waiting.clear()
    if waiting:
        yield bytes(waiting)


def _open(part: Path) -> BinaryIO:
    with storage_errors(part):
        part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb", buffering=0)


def _append(file: BinaryIO, part: Path, piece: bytes) -> None:
    with storage_errors(part):
        require_space(part.parent, len(piece))
        view = memoryview(piece)
        while view:
            view = view[file.write(view) :]


def _publish(part: Path, path: Path) -> None:
    with storage_errors(part):
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(path)
        sync_folder(path.parent)


def _insert(connection: Connection, file: StoredFile, tenant: str) -> None:
    connection.execute(
        """
        INSERT INTO files (id, tenant, filename, purpose, size, media_type, created, expires)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?)
        """,
        (file.id, tenant, file.filename, file.purpose, file.size, file.media_type, file.created, file.expires),
    )
