"""The list of revoked certificates as the broker reads it, and the broker told to read it again.

The database knows who is revoked; the file follows it. A hub that was killed between the two, or a command line beside
a running hub, leaves a list that is behind, and the hub's own round puts it right.
"""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

from appliance.core.clock import Clock
from appliance.hub.enrolments import SqliteEnrolments
from appliance.hub.init import HubFiles
from appliance.security.certificates import Authority, revoked_serials
from appliance.store.private_files import read_file, write_file

logger = logging.getLogger(__name__)


class Revocations:
    """Keeps `revoked.pem` as the database says."""

    def __init__(self, enrolments: SqliteEnrolments, authority: Authority, files: HubFiles, clock: Clock) -> None:
        """Nothing is read or written before `refresh`."""
        self._enrolments = enrolments
        self._authority = authority
        self._files = files
        self._clock = clock

    def refresh(self) -> bool:
        """Write the list if it is behind, and tell the broker; return whether it was.

        Raises:
            StorageError: The list cannot be written.
        """
        now = self._clock.unix()
        due = {int(each.serial, 16): each.revoked or now for each in self._enrolments.revoked(now=now)}
        content = read_file(self._files.revoked, most_bytes=64 * 1024 * 1024)
        written = None if content is None else revoked_serials(content)
        if written is not None and due.keys() <= written:
            return False
        write_file(self._files.revoked, self._authority.revocations(due, now), mode=0o644)
        logger.info("wrote the list of %d revoked certificates", len(due))
        reload_broker(self._files.broker_process)
        return True


def reload_broker(process_file: Path) -> bool:
    """Tell the broker on this machine to read its list again; return False if it is not known which process it is.

    Raises:
        StorageError: The file with its process id cannot be read.
    """
    content = read_file(process_file, most_bytes=64)
    if content is None or not content.strip().isdigit():
        return False
    process = int(content)
    try:
        if b"mosquitto" not in Path(f"/proc/{process}/cmdline").read_bytes().partition(b"\0")[0]:
            return False
        os.kill(process, signal.SIGHUP)
    except OSError as error:
        logger.warning("the broker (process %d) was not told to read its files again: %s", process, error)
        return False
    return True
