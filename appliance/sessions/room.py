"""The room as a whole: the database of conversations and responses, and what keeps it small."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from appliance.core.clock import Clock
from appliance.core.errors import UnavailableError
from appliance.core.settings import Settings
from appliance.sessions.conversations import StoredConversations
from appliance.sessions.erasure import Erasure, Forget
from appliance.sessions.responses import StoredResponses
from appliance.sessions.schema import open_ledger
from appliance.sessions.upkeep import Upkeep
from appliance.store.ownership import ADVICE, Elsewhere, own

LOGGER = logging.getLogger("appliance.sessions")


@dataclass(frozen=True, slots=True)
class Sessions:
    """What is remembered of conversations, and `upkeep.run`, which enforces how long."""

    conversations: StoredConversations
    responses: StoredResponses
    upkeep: Upkeep


@asynccontextmanager
async def open_sessions(settings: Settings, clock: Clock, *, forget: Forget) -> AsyncIterator[Sessions | Elsewhere]:
    """Open what is stored, and close it on leaving; `Upkeep.run` does its work meanwhile.

    What is deleted is forgotten by the models through `forget`. What another process owns is left to it, which is
    logged: or two processes would take up the same unfinished responses.

    Raises:
        StorageError: The database cannot be opened.
    """
    async with AsyncExitStack() as stack:
        try:
            hold = await asyncio.to_thread(own, settings.sessions_lock_path, _in_use)
        except UnavailableError as error:
            LOGGER.warning("%s", error)
            yield Elsewhere(error)
            return
        stack.enter_context(hold)
        database = await asyncio.to_thread(open_ledger, settings.sessions_path)
        stack.callback(database.close)
        erasure = Erasure(database, forget)
        yield Sessions(
            StoredConversations(database, clock, erasure),
            StoredResponses(database, clock, erasure),
            Upkeep(settings, database, clock, erasure),
        )


def _in_use(owner: str) -> UnavailableError:
    return UnavailableError(
        f"The conversations and responses of this data folder are in use by {owner}.",
        advice=ADVICE,
        code="sessions_in_use",
    )
