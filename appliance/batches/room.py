"""The room as a whole: the database of batches, and what works them off."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from appliance.batches.ledger import Ledger
from appliance.batches.runner import BatchRunner
from appliance.batches.schema import open_ledger
from appliance.core.batches import Callers, OfflineDoor
from appliance.core.clock import Clock
from appliance.core.errors import UnavailableError
from appliance.core.retrieval import Files
from appliance.core.settings import Settings
from appliance.observe.metrics import BatchMetrics
from appliance.store.ownership import ADVICE, Elsewhere, own

LOGGER = logging.getLogger("appliance.batches")


@asynccontextmanager
async def open_batches(
    settings: Settings, clock: Clock, *, files: Files, door: OfflineDoor, callers: Callers, metrics: BatchMetrics
) -> AsyncIterator[BatchRunner | Elsewhere]:
    """Open what is stored, and close it on leaving; `BatchRunner.run` does the work meanwhile.

    What another process owns is left to it, which is logged: or two would work off the same lines.

    Raises:
        StorageError: The database cannot be opened.
    """
    async with AsyncExitStack() as stack:
        try:
            stack.enter_context(await asyncio.to_thread(own, settings.batches_lock_path, _in_use))
        except UnavailableError as error:
            LOGGER.warning("%s", error)
            yield Elsewhere(error)
            return
        database = await asyncio.to_thread(open_ledger, settings.batches_path)
        stack.callback(database.close)
        ledger = Ledger(database, clock)
        yield BatchRunner(settings, ledger, clock, files=files, door=door, callers=callers, metrics=metrics)


def _in_use(owner: str) -> UnavailableError:
    return UnavailableError(
        f"The batches of this data folder are in use by {owner}.", advice=ADVICE, code="batches_in_use"
    )
