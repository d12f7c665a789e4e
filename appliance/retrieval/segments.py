"""The keyword index's folder: postings in files that never change, and a manifest that says which of them count.

    manifest.json       what the index is made of, with a checksum of itself; replaced as a whole
    segment-<hex>       postings of passages of one store; written, synced, renamed, then named by the manifest
    *.partial           left over by a process that died
    lock                one process at a time has the folder

    segment:   magic · passages, terms, postings (3 x u64) · ids · lengths · terms · starts · places · counts
               |------------------ head, kept in memory ------------------------------|---- body, read ----|

A segment that the manifest does not name is garbage, and goes at once. Files are read and never mapped: one that is cut
off under a mapping kills the process.
"""

from __future__ import annotations

import errno
import os
import secrets
import weakref
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import ConflictError, StorageError
from appliance.retrieval.postings import MOST_PASSAGES, Counts, Hashes, Ids, MemoryPostings, Part, Places
from appliance.store.locks import Hold, lock

_MAGIC = b"APPLKW1\n"
_COUNTS = np.dtype("<u8")
_HEAD = (np.dtype("<i8"), np.dtype("<u4"), np.dtype("<u8"), np.dtype("<u4"))
_PLACES, _COUNT = np.dtype("<u2"), np.dtype("u1")
_CHUNK_BYTES = 1 << 20
_MOST_TERMS = 1 << 28
_MANIFEST, _LOCK, _SEGMENT, _PARTIAL = "manifest.json", "lock", "segment-", ".partial"
_LOCK_WAIT_S = 2.0
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class DamagedError(Exception):
    """A file is not what was written; the text says which and why. It does not leave this room."""


class Entry(msgspec.Struct, frozen=True):
    """A segment as the manifest names it: the checksums are CRC-32, `removed` the places as little-endian u16."""

    name: str
    store: int
    head_crc: int
    body_crc: int
    removed: bytes


class Manifest(msgspec.Struct, frozen=True):
    """What an index is made of.

    Attributes:
        terms_version: The version of the rules by which its terms were made.
        last_id: The highest chunk id that is in its files, or was.
        faults: Why it is not to be trusted until it is rebuilt.
    """

    terms_version: int
    last_id: int
    segments: tuple[Entry, ...]
    faults: tuple[str, ...] = ()


class StoredPostings:
    """Postings in a file: the head is in memory, the body is read when it is needed. Closed with the last reference."""

    def __init__(self, path: Path, head_crc: int, body_crc: int) -> None:
        """Open the file and check all but its body.

        Raises:
            DamagedError: It is not what was written.
            OSError: It cannot be read.
        """
        self.path, self.head_crc, self.body_crc = path, head_crc, body_crc
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        start = self._read(0, len(_MAGIC) + 3 * 8)
        passages, terms, postings = np.frombuffer(start, _COUNTS, offset=len(_MAGIC)).tolist()
        if start[: len(_MAGIC)] != _MAGIC or passages > MOST_PASSAGES or terms > _MOST_TERMS:
            raise DamagedError(f"{path.name} is no segment of this version")
        head_at = len(start)
        self._places_at = head_at + 12 * passages + 8 * terms + 4 * (terms + 1)
        self._counts_at = self._places_at + 2 * postings
        self.size = self._counts_at + postings
        if os.fstat(self._descriptor).st_size != self.size:
            raise DamagedError(f"{path.name} is not as long as it was")
        head = self._read(head_at, self._places_at - head_at)
        if zlib.crc32(head, zlib.crc32(start)) != head_crc:
            raise DamagedError(f"{path.name} has other bytes than were written")
        self.ids: Ids = np.frombuffer(head, _HEAD[0], passages)
        self.lengths: NDArray[np.uint32] = np.frombuffer(head, _HEAD[1], passages, 8 * passages)
        self.total = int(self.lengths.sum(dtype=np.int64))
        self.terms: Hashes = np.frombuffer(head, _HEAD[2], terms, 12 * passages)
        self.starts: NDArray[np.uint32] = np.frombuffer(head, _HEAD[3], terms + 1, 12 * passages + 8 * terms)

    def read(self, start: int, end: int) -> tuple[Places, Counts]:
        """Return the places and counts of some postings.

        Raises:
            StorageError: The disk fails.
        """
        with storage_errors(self.path):
            try:
                places = self._read(self._places_at + 2 * start, 2 * (end - start))
                counts = self._read(self._counts_at + start, end - start)
            except DamagedError as error:
                raise OSError(errno.EIO, str(error)) from error
        return np.frombuffer(places, _PLACES), np.frombuffer(counts, _COUNT)

    def check_body(self) -> None:
        """Read the body and compare its checksum.

        Raises:
            DamagedError: It is not what was written.
            OSError: It cannot be read.
        """
        crc = 0
        for at in range(self._places_at, self.size, _CHUNK_BYTES):
            crc = zlib.crc32(self._read(at, min(_CHUNK_BYTES, self.size - at)), crc)
        if crc != self.body_crc:
            raise DamagedError(f"{self.path.name} has other bytes than were written")

    def _read(self, at: int, size: int) -> bytes:
        pieces = []
        while size > 0:
            piece = os.pread(self._descriptor, size, at)
            if not piece:
                raise DamagedError(f"{self.path.name} is cut off")
            pieces.append(piece)
            at, size = at + len(piece), size - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class SegmentFolder:
    """Owns the folder; this process alone has it until `close`."""

    def __init__(self, path: Path) -> None:
        """Make the folder if need be, and lock it.

        Raises:
            ConflictError: Another process has it.
            StorageError: It cannot be made or read.
        """
        self.path = path
        with storage_errors(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                descriptor = lock(path / _LOCK, os.O_RDWR | os.O_CREAT, exclusive=True, wait_s=_LOCK_WAIT_S)
            except BlockingIOError as error:
                raise ConflictError(
                    f"Another process has the keyword index in {path}.",
                    advice="Stop it, or give each server a data folder of its own.",
                ) from error
        self._hold = Hold([descriptor])

    def close(self) -> None:
        """Let another process have the folder. Idempotent."""
        self._hold.close()

    def read_manifest(self) -> Manifest | None:
        """Return what the index is made of, or None if there never was one here.

        Raises:
            DamagedError: It is not what was written, or is missing although there are segments.
            StorageError: The disk fails.
        """
        with storage_errors(self.path):
            try:
                data = (self.path / _MANIFEST).read_bytes()
            except FileNotFoundError as error:
                if any(self.path.glob(f"{_SEGMENT}*")):
                    raise DamagedError(f"{_MANIFEST} is missing") from error
                return None
        body, _, crc = data.rpartition(b"\n")
        if crc != b"%08x" % zlib.crc32(body):
            raise DamagedError(f"{_MANIFEST} has other bytes than were written")
        try:
            return msgspec.json.decode(body, type=Manifest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DamagedError(f"{_MANIFEST} is of another version") from error

    def write_manifest(self, manifest: Manifest) -> None:
        """Make this what the index is made of, whatever happens next.

        Raises:
            StorageError: It could not be written, and the one before counts.
        """
        body = msgspec.json.encode(manifest)
        self._write(_MANIFEST, (body, b"\n%08x" % zlib.crc32(body)))

    def write_segment(self, postings: MemoryPostings) -> StoredPostings:
        """Write postings to a new file, which does not count until a manifest names it.

        Raises:
            StorageError: They could not be written; nothing is left of them.
        """
        counts = np.array([len(postings.ids), len(postings.terms), len(postings.places)], _COUNTS)
        head = (
            _MAGIC,
            counts.tobytes(),
            postings.ids.astype(_HEAD[0]).tobytes(),
            postings.lengths.astype(_HEAD[1]).tobytes(),
            postings.terms.astype(_HEAD[2]).tobytes(),
            postings.starts.astype(_HEAD[3]).tobytes(),
        )
        body = (postings.places.astype(_PLACES).tobytes(), postings.counts.tobytes())
        name = _SEGMENT + secrets.token_hex(16)
        self._write(name, (*head, *body))
        with self._damage_as_storage_error(name):
            return StoredPostings(self.path / name, _crc(head), _crc(body))

    def open_segment(self, entry: Entry) -> Part:
        """Open a segment that the manifest names, and check what is kept in memory of it.

        Raises:
            DamagedError: It is missing or is not what was written.
            StorageError: The disk fails.
        """
        path = self.path / entry.name
        with storage_errors(path):
            try:
                postings = StoredPostings(path, entry.head_crc, entry.body_crc)
            except FileNotFoundError as error:
                raise DamagedError(f"{entry.name} is missing") from error
        return Part(postings, np.frombuffer(entry.removed, _PLACES))

    def check_segment(self, part: Part) -> None:
        """Read a segment's file anew, by its name, and compare every byte.

        Raises:
            DamagedError: It is missing or is not what was written.
            StorageError: The disk fails.
        """
        again = self.open_segment(entry_of(0, part)).postings
        assert isinstance(again, StoredPostings)
        with storage_errors(again.path):
            again.check_body()

    def sweep(self, keep: Collection[str]) -> None:
        """Delete every segment but those of these names, and what was left half written.

        Raises:
            StorageError: Not everything could be deleted.
        """
        with storage_errors(self.path):
            garbage = [
                path
                for path in self.path.iterdir()
                if path.name.endswith(_PARTIAL) or (path.name.startswith(_SEGMENT) and path.name not in keep)
            ]
            for path in garbage:
                path.unlink(missing_ok=True)
            if garbage:
                _sync_folder(self.path)

    def _write(self, name: str, parts: Sequence[bytes]) -> None:
        final, partial = self.path / name, self.path / (name + _PARTIAL)
        with storage_errors(final):
            try:
                with partial.open("wb") as file:
                    os.fchmod(file.fileno(), 0o600)
                    file.writelines(parts)
                    file.flush()
                    os.fsync(file.fileno())
                partial.rename(final)
                _sync_folder(self.path)
            except BaseException:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise

    @contextmanager
    def _damage_as_storage_error(self, name: str) -> Iterator[None]:
        """What was written a moment ago must be there; if it is not, it is the disk's fault."""
        try:
            with storage_errors(self.path / name):
                yield
        except DamagedError as error:
            raise StorageError(
                f"The disk of {self.path} lost what was written: {error}.", advice="Look at `dmesg`."
            ) from error


def entry_of(store: int, part: Part) -> Entry:
    """Return how the manifest names a part that is in a file."""
    postings = part.postings
    assert isinstance(postings, StoredPostings)
    removed = part.removed.astype(_PLACES, copy=False).tobytes()
    return Entry(postings.path.name, store, postings.head_crc, postings.body_crc, removed)


def _crc(parts: Sequence[bytes]) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError on the index's files into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"The keyword index failed at {path}: {error.strerror or error}.",
            advice="Check that the disk is sound and has room, and that the folder belongs to this user.",
            code="disk_full" if error.errno in _NO_SPACE else None,
        ) from error
