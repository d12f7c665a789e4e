"""The room as a whole: the database of conversations and responses, and what keeps it small."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from appliance.core.clock import Clock
from appliance.core.settings import Settings
from appliance.sessions.conversations import StoredConversations
from appliance.sessions.erasure import Erasure, Forget
from appliance.sessions.responses import StoredResponses
from appliance.sessions.schema import open_ledger
from appliance.sessions.upkeep import Upkeep


@dataclass(frozen=True, slots=True)
class Sessions:
    """What is remembered of conversations, and `upkeep.run`, which enforces how long."""

    conversations: StoredConversations
    responses: StoredResponses
    upkeep: Upkeep


@asynccontextmanager
async def open_sessions(settings: Settings, clock: Clock, *, forget: Forget) -> AsyncIterator[Sessions]:
    """Open what is stored, and close it on leaving; `Upkeep.run` does its work meanwhile.

    What is deleted is forgotten by the models through `forget`.

    Raises:
        StorageError: The database cannot be opened.
    """
    database = await asyncio.to_thread(open_ledger, settings.sessions_path)
    try:
        erasure = Erasure(database, forget)
        yield Sessions(
            StoredConversations(database, clock, erasure),
            StoredResponses(database, clock, erasure),
            Upkeep(settings, database, clock, erasure),
        )
    finally:
        database.close()
