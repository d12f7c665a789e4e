"""Locks on files that outlive no process: `flock`, which the kernel releases when its holder dies.

Each lock is on the file itself, and the file may be renamed or removed while one waits for it. So a lock counts only
once the path is seen to lead to the locked file still.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

_RETRY_S = 0.02


class Hold:
    """Locked files, released by `close`, by leaving a `with` block, or by the end of the process."""

    def __init__(self, descriptors: Iterable[int]) -> None:
        self._descriptors = list(descriptors)

    def close(self) -> None:
        """Release the locks. Idempotent."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def lock(path: Path, flags: int, *, exclusive: bool, wait_s: float = 0.0) -> int:
    """Open the file and lock it.

    Args:
        path: The file.
        flags: As for `os.open`; close-on-exec and no following of links are added.
        exclusive: Whether anyone else's lock is in the way, or only an exclusive one.
        wait_s: How long to wait for others.

    Returns:
        A file descriptor that holds the lock until it is closed.

    Raises:
        FileNotFoundError: There is no such file, or it was removed while waiting.
        BlockingIOError: Someone else holds it still after `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    operation = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB
    while True:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, operation)
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError) or time.monotonic() >= deadline:
                raise
            time.sleep(_RETRY_S)
            continue
        if _leads_to(path, descriptor):
            return descriptor
        os.close(descriptor)


def share(descriptor: int) -> None:
    """Turn an exclusive lock into a shared one."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def holders(path: Path) -> list[int]:
    """Return the ids of the processes that have a lock on the file, as far as the kernel tells; for messages only."""
    try:
        inode = path.stat().st_ino
        table = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return []
    rows = [line.split() for line in table.splitlines()]
    return sorted({int(row[4]) for row in rows if row[1] == "FLOCK" and row[4] != "0" and row[5].endswith(f":{inode}")})


def _leads_to(path: Path, descriptor: int) -> bool:
    try:
        there, here = path.stat(follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
