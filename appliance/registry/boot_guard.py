"""What keeps a version that brings the process down from doing so for ever.

A start of the server is written down before any model is loaded, and struck out when the server stops in order. So a
crash of native code, which nobody in the process could report, is seen by the next start. A second server on the same
data folder proves nothing of the first one's end, and is not counted: whoever serves holds a shared lock.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from appliance.core.errors import StorageError
from appliance.registry.wishes import Wishes
from appliance.store.locks import Hold, lock, share

LOGGER = logging.getLogger("appliance")
_WAIT_S = 0.5
"""For a process that is just ending."""


class BootGuard:
    """Counts this start of the server, once."""

    def __init__(self, path: Path, wishes: Wishes) -> None:
        """Keep the lock file of those who serve at `path`."""
        self._path = path
        self._wishes = wishes
        self._hold = Hold([])
        self._counted = False

    def begin(self) -> None:
        """Count this start against every version on trial; to be called before any model is loaded.

        Raises:
            StorageError: The lock file or the database cannot be written.
        """
        flags = os.O_RDWR | os.O_CREAT
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                descriptor = lock(self._path, flags, exclusive=True, wait_s=_WAIT_S)
            except BlockingIOError:
                self._hold = Hold([lock(self._path, flags, exclusive=False, wait_s=_WAIT_S)])
                return
        except OSError as error:
            raise StorageError(
                f"{self._path} cannot be locked: {error.strerror}.", advice="Check its owner and rights."
            ) from error
        self._hold = Hold([descriptor])
        for wish in self._wishes.begin_boot():
            LOGGER.error("%s:%s is rolled back: %s", wish.name, wish.version, wish.reason)
        self._counted = True
        share(descriptor)

    def end_in_order(self) -> None:
        """Hold this start against nobody: the server stops because it was told to."""
        if self._counted:
            self._counted = False
            self._wishes.end_boot()

    def close(self) -> None:
        """Serve no more. Idempotent."""
        self._hold.close()
