"""A model file on its way in: blocks are written where they belong, pieces are checked, and both survive a kill.

    partial/sha256-<hex>          the whole length, reserved; `registry.blobs` owns name and lock
    partial/sha256-<hex>.blocks   one byte for each block that was written; never synced, so only a hint

A piece counts once its bytes on the disk have the hash of the signed list. Several of them are synced together and
then noted in the journal; a power cut costs those since. A killed process costs not even a block that was written:
what the hints speak of is held against the list at the next start, and a piece that is wrong then is nobody's lie.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Self, TypeVar, TypeVarTuple

from appliance.core.clock import Clock
from appliance.core.errors import SourceError
from appliance.core.fleet import BLOCK_BYTES, PIECE_BYTES
from appliance.fleet.pieces import BLOCKS_A_PIECE, PieceList, from_bitmap, to_bitmap
from appliance.registry.blobs import Blobs, Partial
from appliance.registry.files import storage_errors

COMMIT_PIECES = 8
COMMIT_S = 5.0
"""How many checked pieces, or how old a one, make a sync and a journal entry due."""

MOST_LIES = 2

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Commit = Callable[[str, bytes], Awaitable[None]]
"""Writes the bitmap of a digest's safe pieces to the journal; durable when it returns."""


class Verdict(Enum):
    """What became of a block or a piece."""

    TAKEN = "taken"
    """Its piece is not whole yet."""
    RIGHT = "right"
    WRONG = "wrong"
    """Its piece was whole and wrong, and is to come anew."""
    MALFORMED = "malformed"
    """It has not the length of that block."""
    USELESS = "useless"
    """It was there already."""


async def in_thread(function: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """Call a function that waits for the disk; when cancelled, wait for its end, for it uses open files."""
    async with asyncio.TaskGroup() as group:
        call = group.create_task(asyncio.to_thread(_outcome, partial(function, *arguments)))
        try:
            outcome = await asyncio.shield(call)
        except asyncio.CancelledError:
            await asyncio.wait({call})
            raise
    return outcome.result()


def _outcome(function: Callable[[], T]) -> Future[T]:
    """Return what becomes of a call, so that its error reaches the caller alone and not in a group."""
    outcome: Future[T] = Future()
    try:
        outcome.set_result(function())
    except Exception as error:  # noqa: BLE001  (it belongs to the caller, whatever it is)
        outcome.set_exception(error)
    return outcome


class Lies:
    """Counts how often each source sent a wrong piece."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def note(self, source: str) -> None:
        """Count one.

        Raises:
            SourceError: It was the last one that is put up with.
        """
        self._counts[source] = self._counts.get(source, 0) + 1
        self.check(source)

    def check(self, source: str) -> None:
        """Refuse a source that has lied too often.

        Raises:
            SourceError: It has.
        """
        if self._counts.get(source, 0) >= MOST_LIES:
            raise SourceError(
                f"{source} sent {self._counts[source]} pieces that are not those of the signed list; it is left.",
                advice="Its copy is damaged or was exchanged: put the release there again.",
                code="source_lied",
            )


class Download:
    """One file on its way. A context manager; leaving keeps what has come. One task at a time may use it."""

    def __init__(
        self, blobs: Blobs, pieces: PieceList, *, safe: bytes, commit: Commit, clock: Clock, lies: Lies
    ) -> None:
        """Open the reserved file.

        Args:
            blobs: Whose partial file it is.
            pieces: The signed list.
            safe: Bitmap of the pieces that the journal has.
            commit: Writes such a bitmap.
            clock: Says when a commit is due.
            lies: Of all sources of this job.

        Raises:
            ConflictError: Another process is fetching the same file.
        """
        self.pieces = pieces
        self._commit = commit
        self._clock = clock
        self._lies = lies
        self._partial: Partial = blobs.partial(pieces.digest)
        try:
            self._hints = Hints(self._partial, pieces)
        except BaseException:
            self._partial.close()
            raise
        self._was_whole = self._partial.size == pieces.length
        self._right = from_bitmap(safe, pieces.count) if self._was_whole else set()
        self._blocks = self._hints.read() if self._was_whole else set()
        self._was_begun = bool(self._right or self._blocks)
        self._inherited = {block // len(pieces.blocks(0)) for block in self._blocks} - self._right
        self._uncommitted = 0
        self._committed_at = clock.monotonic()

    @property
    def was_begun(self) -> bool:
        """Tell whether something had come before this object was made: a process or a source has ended on the way."""
        return self._was_begun

    @property
    def missing(self) -> list[int]:
        """Return the pieces that are not there yet, in order."""
        return [piece for piece in range(self.pieces.count) if piece not in self._right]

    @property
    def complete(self) -> bool:
        """Tell whether every piece is there."""
        return len(self._right) == self.pieces.count

    @property
    def percent(self) -> int:
        """Return how much is there; 100 only when all is."""
        return 100 * len(self._right) // self.pieces.count

    def missing_blocks(self) -> list[int]:
        """Return the blocks that have not been written, of pieces that are missing."""
        return [block for piece in self.missing for block in self.pieces.blocks(piece) if block not in self._blocks]

    async def recover(self) -> None:
        """Take over the pieces that an earlier process had written and not noted; forget what it noted of another."""
        if not self._was_whole:
            self._hints.clear(range(self.pieces.block_count))
            await self._commit(self.pieces.digest, b"")
        for piece in self.missing:
            if all(block in self._blocks for block in self.pieces.blocks(piece)):
                await self._judge(piece)
        await self.commit()

    async def put_block(self, block: int, data: bytes, source: str) -> Verdict:
        """Write one block of the file; check its piece if it was the last one of it.

        Raises:
            SourceError: The source has sent too many wrong pieces.
            StorageError: The disk is full or failed.
        """
        piece = block // BLOCKS_A_PIECE
        if piece in self._right or block in self._blocks:
            return Verdict.USELESS
        if len(data) != self.pieces.block_size(block):
            self._lies.note(source)
            return Verdict.MALFORMED
        await in_thread(self._write, block * BLOCK_BYTES, data, (block,))
        if not all(each in self._blocks for each in self.pieces.blocks(piece)):
            return Verdict.TAKEN
        is_own = piece not in self._inherited
        if await self._judge(piece):
            await self._commit_if_due()
            return Verdict.RIGHT
        if is_own:
            self._lies.note(source)
        return Verdict.WRONG

    async def put_piece(self, piece: int, data: bytes, source: str) -> Verdict:
        """Check a whole piece, and write it if it is right. Raises as `put_block`."""
        if piece in self._right:
            return Verdict.USELESS
        if not await in_thread(self.pieces.accepts, piece, data):
            self._lies.note(source)
            return Verdict.WRONG
        await in_thread(self._write, piece * PIECE_BYTES, data, tuple(self.pieces.blocks(piece)))
        self._take(piece)
        await self._commit_if_due()
        return Verdict.RIGHT

    def check_source(self, source: str) -> None:
        """Refuse a source that has lied too often already. Raises as `put_block`."""
        self._lies.check(source)

    async def commit(self) -> None:
        """Sync the pieces that are right, then note them in the journal.

        Raises:
            StorageError: The disk failed; nothing was noted.
        """
        if self._uncommitted:
            await in_thread(self._sync)
            await self._commit(self.pieces.digest, to_bitmap(self._right, self.pieces.count))
            self._uncommitted = 0
        self._committed_at = self._clock.monotonic()

    async def drop_wrong(self) -> None:
        """Check all pieces on the disk again, and forget those that are wrong."""
        for piece in sorted(self._right):
            if not self.pieces.accepts(piece, await in_thread(self._read, piece)):
                self._forget(piece)
        await self._commit(self.pieces.digest, to_bitmap(self._right, self.pieces.count))

    def close(self) -> None:
        """Release the file. Idempotent."""
        self._hints.close()
        self._partial.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def _judge(self, piece: int) -> bool:
        if self.pieces.accepts(piece, await in_thread(self._read, piece)):
            self._take(piece)
            return True
        self._forget(piece)
        return False

    def _take(self, piece: int) -> None:
        self._right.add(piece)
        self._uncommitted += 1

    def _forget(self, piece: int) -> None:
        self._right.discard(piece)
        self._inherited.discard(piece)
        self._blocks.difference_update(self.pieces.blocks(piece))
        self._hints.clear(self.pieces.blocks(piece))

    async def _commit_if_due(self) -> None:
        is_old = self._clock.monotonic() - self._committed_at >= COMMIT_S
        if self._uncommitted >= COMMIT_PIECES or is_old or self.complete:
            await self.commit()

    def _write(self, offset: int, data: bytes, blocks: Iterable[int]) -> None:
        with storage_errors(self._partial.path):
            write_all(self._partial.file.fileno(), data, offset)
        for block in blocks:
            self._hints.set(block)
            self._blocks.add(block)

    def _read(self, piece: int) -> bytes:
        with storage_errors(self._partial.path):
            offset = piece * PIECE_BYTES
            return os.pread(self._partial.file.fileno(), self.pieces.piece_size(piece), offset)

    def _sync(self) -> None:
        with storage_errors(self._partial.path):
            os.fsync(self._partial.file.fileno())


class Hints:
    """Which blocks of a partial file were written, as far as the last process could say."""

    def __init__(self, partial: Partial, pieces: PieceList) -> None:
        self._path = partial.path.with_name(f"{partial.path.name}.blocks")
        self._count = pieces.block_count
        with storage_errors(self._path):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def read(self) -> set[int]:
        """Return the blocks."""
        with storage_errors(self._path):
            written = os.pread(self._descriptor, self._count, 0)
        return {block for block, byte in enumerate(written) if byte == 1}

    def set(self, block: int) -> None:
        """Say that a block was written."""
        with storage_errors(self._path):
            os.pwrite(self._descriptor, b"\x01", block)

    def clear(self, blocks: Iterable[int]) -> None:
        """Say that blocks are worth nothing."""
        with storage_errors(self._path):
            for block in blocks:
                os.pwrite(self._descriptor, b"\x00", block)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_reserved(blobs: Blobs, pieces: PieceList) -> bool:
    """Tell whether the partial file has its whole length; else nothing that the journal says of it counts any more.

    Raises:
        ConflictError: Another process is fetching the same file.
    """
    with blobs.partial(pieces.digest) as file:
        return file.size == pieces.length


def reserve(blobs: Blobs, pieces: PieceList) -> None:
    """Give the partial file its whole length on the disk.

    Raises:
        StorageError: The disk is full; what was there before stays.
        ConflictError: Another process is fetching the same file.
    """
    file = blobs.partial(pieces.digest)
    try:
        had = file.size
        hints = Hints(file, pieces)
        try:
            _carry_over(hints, had, pieces)
            blobs.require_space(pieces.length - had, "fetch an update")
            with storage_errors(file.path):
                if had > pieces.length:
                    os.ftruncate(file.file.fileno(), pieces.length)
                os.posix_fallocate(file.file.fileno(), 0, pieces.length)
                os.fsync(file.file.fileno())
        except BaseException:
            with suppress(OSError):
                os.ftruncate(file.file.fileno(), min(had, pieces.length))  # or a full disk would stay full
            raise
        finally:
            hints.close()
    finally:
        file.close()


def discard(blobs: Blobs, digest: str) -> None:
    """Delete what has come of a file.

    Raises:
        ConflictError: Another process is fetching it.
    """
    file = blobs.partial(digest)
    forget_hints(blobs, digest)
    file.discard()


def forget_hints(blobs: Blobs, digest: str) -> None:
    """Delete what was noted of a file's blocks."""
    path = blobs.partial_folder / f"sha256-{digest}.blocks"
    with storage_errors(path):
        path.unlink(missing_ok=True)


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Write at an offset, all of it."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        offset += written
        view = view[written:]


def _carry_over(hints: Hints, had: int, pieces: PieceList) -> None:
    """Let the beginning that an interrupted `models pull` left be looked at, and nothing else."""
    hints.clear(range(pieces.block_count))
    for block in range(min(had, pieces.length) // BLOCK_BYTES):
        hints.set(block)
