"""Deletion that is erasure: nothing is found from the first transaction on, and no byte of the text is left at the end.

    1. one transaction: conversation, item or response is gone, and the erasure is recorded
    2. rows that nobody has any more, some at a time
    3. the keyword index is written anew without their words, some pages at a time
    4. the models forget what they keep of the text, in memory and in files; the record forgets whose it was
    5. the log of the database is emptied
    6. the record is deleted

Every step can be done again, so an erasure that a crash or a busy log ended goes on from its record.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from functools import partial

from appliance.core.errors import StorageError
from appliance.sessions.removal import delete_waste
from appliance.sessions.words import merge
from appliance.store.database import Connection, Database

Forget = Callable[[Collection[str]], Awaitable[None]]
"""Has the models forget sessions; see `core.types.TextModels.forget`."""

LOGGER = logging.getLogger("appliance.sessions")

PATIENCE_S = 60.0
"""How long a caller waits for the end; what is left then is done behind his back."""

RETRY_S = 0.25
"""Time between looks at a log that somebody reads."""


class Erasure:
    """Erases what was removed. Runs on the event loop."""

    def __init__(self, database: Database, forget: Forget) -> None:
        """Erase from `sessions.db`, and have the models forget."""
        self._database = database
        self._forget = forget
        self._turn = asyncio.Lock()

    async def erase(self, remove: Callable[[Connection], None]) -> None:
        """Run step 1 in a transaction, and return when the others are done, or after `PATIENCE_S`.

        Whoever gives up waiting stops nothing: the erasure is recorded.
        """
        await self._database.write(remove)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self.finish()
        except TimeoutError:
            LOGGER.warning("an erasure takes longer than %g s; it goes on later", PATIENCE_S)

    async def finish(self) -> None:
        """Do what is recorded."""
        async with self._turn:
            recorded = self._database.read(
                lambda each: each.execute("SELECT key, session FROM erasures ORDER BY key").fetchall()
            )
            if not recorded:
                return
            while await self._database.write(delete_waste):
                pass
            begin = True
            while await self._database.write(partial(merge, begin=begin)):
                begin = False
            last = recorded[-1][0]
            if sessions := {session for _, session in recorded if session}:
                await self._forget(sessions)
            await self._database.write(
                lambda each: each.execute("UPDATE erasures SET session = '' WHERE key <= ?", (last,)).close()
            )
            await self._empty_log()
            await self._database.write(
                lambda each: each.execute("DELETE FROM erasures WHERE key <= ?", (last,)).close()
            )

    async def _empty_log(self) -> None:
        while True:
            try:
                return await self._database.erase_log()
            except StorageError as error:
                LOGGER.info("an erasure waits: %s", error)
            await asyncio.sleep(RETRY_S)
