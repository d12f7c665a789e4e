"""What is done beside the requests: old conversations and responses go, deletions end, the keyword index is current."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings
from appliance.sessions.erasure import Erasure
from appliance.sessions.history import item_of
from appliance.sessions.removal import erase_response, remove_conversation
from appliance.sessions.words import begin_anew, end_anew, index, is_current
from appliance.store.database import Connection, Database, Row

LOGGER = logging.getLogger("appliance.sessions")

EVERY_S = 60.0
DAY_S = 86_400

SLICE = 20
"""Conversations or responses that one transaction takes out."""

INDEXED_AT_ONCE = 200


_IDLE = """
    NOT EXISTS (
        SELECT 1 FROM responses
        WHERE conversation = conversations.id AND status IN ('queued', 'in_progress') AND NOT waste
    )
"""


class Upkeep:
    """Keeps `sessions.db` within its limits."""

    def __init__(self, settings: Settings, database: Database, clock: Clock, erasure: Erasure) -> None:
        """Enforce the settings on the database."""
        self._settings = settings
        self._database = database
        self._clock = clock
        self._erasure = erasure

    async def run(self) -> None:
        """Do what is to be done, now and every minute, until cancelled."""
        while True:
            try:
                await self.once()
            except ApplianceError as error:
                LOGGER.warning("conversations were not tidied up: %s", error)
            await asyncio.sleep(EVERY_S)

    async def once(self) -> None:
        """Do what is to be done."""
        await self._index_anew()
        while await self._database.write(self._remove):
            pass
        await self._erasure.finish()

    def _remove(self, connection: Connection) -> int:
        """Take out some of what is too old or too many, and return how many there were."""
        conversations = [*self._old(connection), *self._too_many(connection)]
        for row in {row["key"]: row for row in conversations}.values():
            remove_conversation(connection, row)
        responses = self._old_responses(connection)
        for row in responses:
            erase_response(connection, row)
        return len(conversations) + len(responses)

    def _old(self, connection: Connection) -> Sequence[Row]:
        days = self._settings.conversation_days
        sql = f"SELECT * FROM conversations WHERE updated < ? AND {_IDLE} ORDER BY updated LIMIT ?"  # noqa: S608
        return connection.execute(sql, (self._before(days), SLICE)).fetchall() if days else []

    def _too_many(self, connection: Connection) -> Sequence[Row]:
        """Return conversations of a tenant who has too many, those longest unused."""
        most = self._settings.max_conversations
        if not most:
            return []
        sql = "SELECT tenant, count(*) FROM conversations GROUP BY tenant HAVING count(*) > ? LIMIT 1"
        row = connection.execute(sql, (most,)).fetchone()
        if row is None:
            return []
        sql = f"SELECT * FROM conversations WHERE tenant = ? AND {_IDLE} ORDER BY updated, key LIMIT ?"  # noqa: S608
        return connection.execute(sql, (row[0], min(row[1] - most, SLICE))).fetchall()

    def _old_responses(self, connection: Connection) -> Sequence[Row]:
        """Return old responses that nothing follows: what followed them is as old, and went before."""
        days = self._settings.response_days
        sql = """
            SELECT * FROM responses WHERE created < ? AND NOT waste AND status NOT IN ('queued', 'in_progress')
            AND NOT EXISTS (SELECT 1 FROM responses AS later WHERE later.before = responses.key) LIMIT ?
        """
        return connection.execute(sql, (self._before(days), SLICE)).fetchall() if days else []

    def _before(self, days: int) -> int:
        return int(self._clock.unix()) - days * DAY_S

    async def _index_anew(self) -> None:
        """Make the keyword index with the terms of this program, if another made it."""
        if self._database.read(is_current):
            return
        await self._database.write(begin_anew)
        after: int | None = 0
        while after is not None:
            after = await self._database.write(partial(_index_some, after=after))
        await self._database.write(end_anew)


def _index_some(connection: Connection, after: int) -> int | None:
    """Index some messages behind a key, and return the key to go on from, or None at the end."""
    sql = """
        SELECT messages.key, line, item, tenant FROM messages JOIN lines ON lines.key = line
        WHERE messages.key > ? AND item IS NOT NULL ORDER BY messages.key LIMIT ?
    """
    rows = connection.execute(sql, (after, INDEXED_AT_ONCE)).fetchall()
    for each in rows:
        index(connection, each["key"], item_of(each), tenant=each["tenant"], line=each["line"])
    return rows[-1]["key"] if rows else None
