"""Notices that the director's key has changed, and has everything signed and sent again that devices are to keep.

After `hub keys rotate` devices refuse what the old key has signed, and the broker still keeps that for each of them.
Which key has signed what was sent is a row: a key that was changed while no hub ran is noticed at the next start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from appliance.core.errors import ApplianceError
from appliance.core.fleet import UpKind
from appliance.core.messaging import Message
from appliance.store.database import Connection, Database

if TYPE_CHECKING:
    from appliance.hub.room import Means

logger = logging.getLogger("appliance.hub")

POLL_S = 1.0
PROBLEM_S = 30.0


class KeyWatch:
    """A part of the hub that reads no topic."""

    kinds: frozenset[UpKind] = frozenset()

    def __init__(self, database: Database, key_id: Callable[[], str]) -> None:
        """Watch which key the director has."""
        self._database = database
        self._key_id = key_id

    async def handle(self, device: str, kind: UpKind, rest: str, message: Message) -> None:
        """Take nothing."""

    async def run(self) -> None:
        """Look every second, for as long as the hub runs."""
        while True:
            pause_s = POLL_S
            try:
                await self.look()
            except ApplianceError as error:
                logger.warning("It is not known which key signs jobs and desired twins: %s", error)
                pause_s = PROBLEM_S
            await asyncio.sleep(pause_s)

    async def look(self) -> bool:
        """Have all be sent again if another key signs now; return whether one does.

        Raises:
            StorageError: No key on this hub is one that devices believe, or the database failed.
        """
        key = self._key_id()
        if self._database.read(signing_key) == key:
            return False
        await self._database.write(lambda connection: _send_all_again(connection, key))
        logger.info("jobs and desired twins are signed with the key %s from now on, and sent again", key[:16])
        return True


def signing_key(connection: Connection) -> str:
    """Return the id of the key that has signed what was sent, "" before anything was."""
    row = connection.execute("SELECT key FROM signing_key").fetchone()
    return "" if row is None else str(row["key"])


def _send_all_again(connection: Connection, key: str) -> None:
    connection.execute("DELETE FROM signing_key")
    connection.execute("INSERT INTO signing_key (key) VALUES (?)", (key,))
    connection.execute("UPDATE twin_versions SET published = NULL")
    connection.execute("UPDATE device_jobs SET published = NULL WHERE device IN (SELECT id FROM devices)")


def plug_key_watch(means: Means) -> KeyWatch:
    """Make the part."""
    return KeyWatch(means.database, means.director.key_id)
