"""Parked states as files: each whole or not there, and never handed on unless every byte is what was written.

One folder for all states that can be used alike, named by their `Origin`; in it one file a state, named by the state's
random id, which says nothing about the text.

A file is written under another name, synced, renamed, and the folder is synced; so after a kill or a power cut there
are whole states and leftovers, and the next scan deletes the leftovers. A lock gives the folder to one process.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from appliance.core.errors import ConflictError, StorageError
from appliance.engine.llama.state_format import DamagedError, StateHead, encode_head, read_head
from appliance.store.locks import lock

LOGGER = logging.getLogger("appliance.engine")

Payload = npt.NDArray[np.uint8]

LARGEST_RESERVE_BYTES = 2**30
RESERVE_SHARE = 0.05
"""So much of the disk, or the largest reserve if that is less, is left free for everyone else."""

_CHUNK_BYTES = 2**20
_LOCK_WAIT_S = 2.0
"""As long as another process may take to clear away a folder that it believes abandoned."""

_ID = re.compile(r"[0-9a-f]{32}")
_FOLDER = re.compile(r"[0-9a-f]{64}")
_STATE, _PARTIAL = ".kv", ".partial"
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def new_id() -> str:
    """Return a state's id that was never used before."""
    return secrets.token_hex(16)


class StateFiles:
    """The folder of one origin's states. Several threads may use it at once, but only one the same state."""

    def __init__(self, root: Path, fingerprint: str, *, wait_s: float = _LOCK_WAIT_S) -> None:
        """Make the folder below `root` if need be, and lock it; wait so long for another process to let it go.

        Raises:
            ConflictError: Another process has it.
            StorageError: It cannot be made or read.
        """
        self.path = root / fingerprint
        self._fingerprint = fingerprint
        self._last_use_ns = 0
        self._folder = -1
        try:
            with self._storage_errors("opened"):
                root.mkdir(mode=0o700, exist_ok=True)
                self._folder = _lock_folder(self.path, wait_s)
                os.fchmod(self._folder, 0o700)
        except StorageError:
            self.close()
            raise

    def close(self) -> None:
        """Let another process have the folder. Idempotent."""
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    def scan(self) -> list[StateHead]:
        """Return every sound state's head, the one used last coming last; leftovers and unsound files are deleted.

        Payloads are not read: `read` checks them.

        Raises:
            StorageError: The folder cannot be read.
        """
        found: list[tuple[int, StateHead]] = []
        with self._storage_errors("read"):
            names = _names(self._folder)
        for name in names:
            state_id = name.removesuffix(_STATE)
            if name == state_id or not _ID.fullmatch(state_id):
                self._clear(name)
                continue
            try:
                with self._open(state_id) as file:
                    head, _ = read_head(file, state_id, self._fingerprint)
                    found.append((os.fstat(file.fileno()).st_mtime_ns, head))
            except (OSError, DamagedError) as error:
                self._drop(state_id, error)
        found.sort(key=lambda each: each[0])
        self._last_use_ns = found[-1][0] if found else 0
        return [head for _, head in found]

    def write(self, head: StateHead, payload: Payload) -> None:
        """Write a state; when this returns it survives a power cut.

        Args:
            head: What it is.
            payload: Its bytes, shape (head.size,), contiguous.

        Raises:
            StorageError: It could not be written, or that would leave the disk too full; nothing has changed then.
        """
        _check_size(head, payload)
        final, partial = self._name(head.id), head.id + _PARTIAL
        before = encode_head(head, self._fingerprint, hashlib.sha256(payload.data).digest())
        with self._storage_errors("written"):
            self._require_space(len(before) + head.size)
            try:
                self._write_synced(partial, memoryview(before), payload.data)
                os.rename(partial, final, src_dir_fd=self._folder, dst_dir_fd=self._folder)
                os.fsync(self._folder)
            except BaseException:
                for name in (partial, final):
                    with suppress(OSError):
                        os.unlink(name, dir_fd=self._folder)
                raise
        self.touch(head.id)

    def read(self, head: StateHead, payload: Payload | None = None) -> Payload | None:
        """Read a state's payload, into the given memory of head.size bytes or into new memory.

        Returns:
            None when any byte of the file is not what `write` wrote for this head; the file is deleted then.
        """
        memory = np.empty(head.size, np.uint8) if payload is None else payload
        _check_size(head, memory)
        try:
            with self._open(head.id) as file:
                self._read_verified(file, head, memory)
        except (OSError, DamagedError) as error:
            self._drop(head.id, error)
            return None
        return memory

    def touch(self, state_id: str) -> None:
        """Record that a state was used, for the order of the next scan. A state without a file has none to lose."""
        self._last_use_ns = max(self._last_use_ns + 1, time.time_ns())  # in order, although the clock may be set back
        with suppress(OSError):
            os.utime(self._name(state_id), ns=(self._last_use_ns, self._last_use_ns), dir_fd=self._folder)

    def erase(self, state_id: str) -> None:
        """Delete a state's file, if there is one.

        Raises:
            StorageError: It cannot be deleted.
        """
        with self._storage_errors("deleted"), suppress(FileNotFoundError):
            os.unlink(self._name(state_id), dir_fd=self._folder)

    def sync(self) -> None:
        """Make what was erased stay so even if the power fails next.

        Raises:
            StorageError: The disk refuses.
        """
        with self._storage_errors("deleted"):
            os.fsync(self._folder)

    def erase_all(self) -> None:
        """Delete every state, for good even if the power fails next.

        Raises:
            StorageError: Not all could be deleted.
        """
        with self._storage_errors("deleted"):
            _unlink_ours(self._folder)
            os.fsync(self._folder)

    # Files

    def _name(self, state_id: str) -> str:
        if not _ID.fullmatch(state_id):
            raise ValueError(f"{state_id!r} is no state's id")
        return state_id + _STATE

    def _open(self, state_id: str) -> io.FileIO:
        def open_here(name: str, flags: int) -> int:
            return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._folder)  # waits for no pipe

        file = io.FileIO(self._name(state_id), opener=open_here)
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise DamagedError("it is no file")
        return file

    def _read_verified(self, file: io.FileIO, head: StateHead, memory: Payload) -> None:
        found, digest = read_head(file, head.id, self._fingerprint)
        if found != head:
            raise DamagedError("it holds another state than it should")
        if _read_hashed(file, memory.data) != digest:
            raise DamagedError("its payload is not what was written")

    def _write_synced(self, name: str, *parts: memoryview) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=self._folder)
        try:
            for part in parts:
                _write_all(descriptor, part)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _require_space(self, needed: int) -> None:
        disk = shutil.disk_usage(self._folder)
        reserve = min(int(disk.total * RESERVE_SHARE), LARGEST_RESERVE_BYTES)
        if needed + reserve > disk.free:
            raise StorageError(
                f"The disk of {self.path} is too full to park a conversation: {needed:,} bytes are needed and "
                f"{reserve:,} in reserve, {disk.free:,} are free.",
                advice="Make room; until then conversations are parked in RAM only.",
                code="disk_full",
            )

    def _clear(self, name: str) -> None:
        """Delete a leftover. What is not ours by its name is left alone."""
        if not name.endswith((_STATE, _PARTIAL)):
            LOGGER.warning("%s is in the folder of parked states and is left alone.", self.path / name)
            return
        try:
            os.unlink(name, dir_fd=self._folder)
        except OSError as error:
            LOGGER.warning("%s cannot be deleted: %s.", self.path / name, error.strerror)

    def _drop(self, state_id: str, error: OSError | DamagedError) -> None:
        reason = error.strerror if isinstance(error, OSError) else error
        LOGGER.warning("The parked state %s is dropped, and recomputed when it is needed: %s.", state_id, reason)
        self._clear(self._name(state_id))

    @contextmanager
    def _storage_errors(self, done: str) -> Iterator[None]:
        try:
            yield
        except BlockingIOError as error:
            raise ConflictError(
                f"Another process keeps parked conversations in {self.path}.",
                advice="Give each server a data folder of its own.",
            ) from error
        except OSError as error:
            raise StorageError(
                f"Parked states in {self.path} cannot be {done}: {error.strerror or error}.",
                advice="Check that the disk is sound and has room, and that the folder belongs to this user.",
                code="disk_full" if error.errno in _NO_SPACE else None,
            ) from error


def remove_foreign(root: Path, keep: Collection[str]) -> None:
    """Delete the states of all origins but those of the fingerprints to keep, and those that another process has.

    Raises:
        StorageError: The folder cannot be read.
    """
    try:
        foreign = [each for each in root.iterdir() if _FOLDER.fullmatch(each.name) and each.name not in keep]
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{root} cannot be read: {error.strerror}.", advice="Check that it is yours.") from error
    for path in foreign:
        try:
            folder = lock(path, os.O_RDONLY | os.O_DIRECTORY, exclusive=True)
        except OSError:
            continue  # another process has it, or has removed it, or it is no folder
        try:
            _unlink_ours(folder)
            path.rmdir()
        except OSError as error:
            LOGGER.warning("%s cannot be removed: %s.", path, error.strerror)
        finally:
            os.close(folder)


def erase_sessions(root: Path, sessions: Collection[str], *, skip: Collection[str | None] = ()) -> bool:
    """Delete the states of sessions of all origins, but those to skip, for good even if the power fails next.

    Returns:
        Whether that was all; False if somebody has the folder of one.

    Raises:
        StorageError: Not all could be deleted.
    """
    complete = True
    try:
        for path in [each for each in root.iterdir() if _FOLDER.fullmatch(each.name) and each.name not in skip]:
            complete = _erase_sessions(path, sessions) and complete
    except FileNotFoundError:
        return complete  # nothing was ever parked
    except OSError as error:
        raise StorageError(
            f"Parked states in {root} cannot be deleted: {error.strerror or error}.", advice="Check that it is yours."
        ) from error
    return complete


def _erase_sessions(path: Path, sessions: Collection[str]) -> bool:
    try:
        files = StateFiles(path.parent, path.name, wait_s=0.0)
    except ConflictError:
        return False
    try:
        found = [each.id for each in files.scan() if each.session in sessions]
        for state_id in found:
            files.erase(state_id)
        files.sync()
        return True
    finally:
        files.close()


def _lock_folder(path: Path, wait_s: float) -> int:
    """Make the folder if need be and return a descriptor that holds its lock."""
    while True:
        path.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):  # another process removed it in between
            return lock(path, os.O_RDONLY | os.O_DIRECTORY, exclusive=True, wait_s=wait_s)


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return [each.name for each in entries]


def _unlink_ours(folder: int) -> None:
    for name in _names(folder):
        if name.endswith((_STATE, _PARTIAL)):
            os.unlink(name, dir_fd=folder)


def _check_size(head: StateHead, payload: Payload) -> None:
    if payload.shape != (head.size,):
        raise ValueError(f"a payload of shape {payload.shape} for a state of {head.size} bytes")


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read_hashed(file: io.FileIO, memory: memoryview) -> bytes:
    """Fill the memory from the file and return the SHA-256 of what was read."""
    digest = hashlib.sha256()
    while memory:
        count = file.readinto(memory[:_CHUNK_BYTES])
        if not count:
            raise DamagedError("it ends too early")
        digest.update(memory[:count])  # while it is in the processor's cache
        memory = memory[count:]
    return digest.digest()
