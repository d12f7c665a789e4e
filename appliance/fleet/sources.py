"""Where pieces of a model file may come from. Any of them may lie, since each piece is checked; who lies twice is left.

In this order: what the box has already, folders (a stick, a share), then HTTPS mirrors and the hub's blocks over MQTT;
a large file prefers the mirrors, a small one the connection that stands.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Protocol

from appliance.core.errors import InvalidRequestError, NotFoundError, SourceError, UnavailableError
from appliance.core.fleet import PIECE_BYTES
from appliance.fleet.download import Download, in_thread
from appliance.registry.files import open_regular, storage_errors
from appliance.registry.sources.ranges import RangeBody, open_range

LARGE_BYTES = 64 * 1024 * 1024
"""From this size on mirrors are asked before the hub."""

PIECES_A_RANGE = 16
MOST_FRUITLESS = 2
"""So often in a row an https source may break off without a piece before it is left for another."""
STALL_TIMEOUT_S = 30.0

Context = Callable[[], ssl.SSLContext]


class Source(Protocol):
    """Somewhere that pieces come from."""

    @property
    def name(self) -> str:
        """Return what it is called in messages."""
        ...

    async def deliver(self, download: Download) -> None:
        """Put in what it has of what is missing.

        Raises:
            SourceError: It cannot go on, see the code: `gone`, `source_lied`, `source_slow`, ….
            UnavailableError: It cannot be reached now.
            StorageError: The disk is full or failed.
        """
        ...


class BlobSource:
    """Files that are on the box, whose pieces are found by their hash, wherever in the file they are."""

    def __init__(self, paths: Callable[[], Sequence[Path]]) -> None:
        self._paths = paths

    @property
    def name(self) -> str:
        """Return what it is called."""
        return "this box"

    async def deliver(self, download: Download) -> None:
        """Put in every piece that a file here has too."""
        places = download.pieces.places()
        for path in self._paths():
            if download.complete:
                return
            try:
                file = open_regular(path)
            except (NotFoundError, InvalidRequestError):
                continue  # removed meanwhile
            with file:
                await self._search(path, file, places, download)

    async def _search(self, path: Path, file: BinaryIO, places: dict[bytes, list[int]], download: Download) -> None:
        while data := await in_thread(_read_piece, path, file):
            for piece in places.get(await in_thread(_hash, data), ()):
                await download.put_piece(piece, data, self.name)


class FolderSource:
    """A folder that has the file under its hash, such as `hub releases export` makes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def name(self) -> str:
        """Return what it is called."""
        return f"the folder {self._folder}"

    async def deliver(self, download: Download) -> None:
        """Put in the pieces that are missing, as far as they are here and right."""
        download.check_source(self.name)
        path = self._folder / f"sha256-{download.pieces.digest}"
        try:
            file = await in_thread(open_regular, path)
        except (NotFoundError, InvalidRequestError) as error:
            raise SourceError(error.message, advice=error.advice, code="gone") from error
        with file:
            for piece in download.missing:
                data = await in_thread(_read_at, path, file, piece)
                if data:
                    await download.put_piece(piece, data, self.name)
        if not download.complete:
            raise SourceError(f"{self.name} does not have all of sha256-{download.pieces.digest}.", code="gone")


class MirrorSource:
    """An https address under which the file is found by its hash."""

    def __init__(self, base: str, *, context: Context | None = None, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        """Fetch from an address; `context` says whom to believe there and what certificate to show, else the system."""
        self._base = base.rstrip("/")
        self._context = context
        self._stall_timeout_s = stall_timeout_s

    @property
    def name(self) -> str:
        """Return what it is called."""
        return f"the mirror {self._base}"

    async def deliver(self, download: Download) -> None:
        """Fetch runs of missing pieces until there are none; a connection that broke is made anew if it was of use."""
        download.check_source(self.name)
        fruitless = 0
        while missing := download.missing:
            try:
                await self._fetch(download, _run(missing))
            except InvalidRequestError as error:
                raise SourceError(error.message, advice=error.advice, code=error.code) from error
            except SourceError as error:
                fruitless = 0 if len(download.missing) < len(missing) else fruitless + 1
                if error.code != SourceError.default_code or fruitless >= MOST_FRUITLESS:
                    raise

    async def _fetch(self, download: Download, run: range) -> None:
        pieces = download.pieces
        end = min(run.stop * PIECE_BYTES, pieces.length)
        opened = ExitStack()
        try:
            body = await in_thread(
                lambda: opened.enter_context(
                    open_range(
                        f"{self._base}/sha256-{pieces.digest}",
                        run.start * PIECE_BYTES,
                        end,
                        pieces.length,
                        stall_timeout_s=self._stall_timeout_s,
                        context=self._tls(),
                    )
                )
            )
            await self._take(download, run, body)
        finally:
            await in_thread(opened.close)

    def _tls(self) -> ssl.SSLContext | None:
        try:
            return None if self._context is None else self._context()
        except OSError as error:
            raise SourceError(
                f"{self.name} cannot be asked: this box's certificate cannot be read: {error}."
            ) from error

    async def _take(self, download: Download, run: range, body: RangeBody) -> None:
        for piece in run:
            data = await in_thread(body.read, download.pieces.piece_size(piece))
            await download.put_piece(piece, data, self.name)


def in_order(
    length: int,
    *,
    here: Source,
    folders: Sequence[Source],
    mirrors: Sequence[Source],
    hub: Source | None,
    patient_hub: Source | None,
) -> list[Source]:
    """Return the sources of a file of this length, the first to be asked first; the patient hub waits for ever."""
    hubs = [hub] if hub is not None and mirrors and length < LARGE_BYTES else []
    last = [patient_hub] if patient_hub is not None else []
    return [here, *folders, *hubs, *mirrors, *last]


async def fetch(download: Download, sources: Sequence[Source]) -> None:
    """Complete a download from the first sources that have what is missing.

    Raises:
        SourceError: None could; the code is `gone` if none has it, or that of the last one.
        UnavailableError: The last one cannot be reached now.
        StorageError: The disk is full or failed; what came is kept.
    """
    failures: list[SourceError | UnavailableError] = []
    try:
        await download.recover()
        for source in sources:
            if download.complete:
                break
            try:
                await source.deliver(download)
            except (SourceError, UnavailableError) as error:
                failures.append(error)
    finally:
        await download.commit()
    if not download.complete:
        _give_up(download, failures)


def _give_up(download: Download, failures: Sequence[SourceError | UnavailableError]) -> None:
    reasons = " ".join(each.message for each in failures) or "There is none."
    codes = {each.code for each in failures}
    message = f"{len(download.missing):,} of {download.pieces.count:,} pieces could be had nowhere: {reasons}"
    if any(isinstance(each, UnavailableError) for each in failures):
        raise UnavailableError(message, advice="It is tried again by itself.", code="unreachable")
    code = codes.pop() if len(codes) == 1 else "source_failed"
    raise SourceError(message, advice="Put the release where the box can reach it.", code=code)


def _run(missing: Sequence[int]) -> range:
    """Return the first pieces that follow each other."""
    count = 1
    while count < min(len(missing), PIECES_A_RANGE) and missing[count] == missing[0] + count:
        count += 1
    return range(missing[0], missing[0] + count)


def _read_piece(path: Path, file: BinaryIO) -> bytes:
    with storage_errors(path):
        return file.read(PIECE_BYTES)


def _read_at(path: Path, file: BinaryIO, piece: int) -> bytes:
    with storage_errors(path):
        return os.pread(file.fileno(), PIECE_BYTES, piece * PIECE_BYTES)


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
