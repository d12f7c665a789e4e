"""The room as a whole: the database of batches, and what works them off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from appliance.batches.ledger import Ledger
from appliance.batches.runner import BatchRunner
from appliance.batches.schema import open_ledger
from appliance.core.batches import Callers, OfflineDoor
from appliance.core.clock import Clock
from appliance.core.retrieval import Files
from appliance.core.settings import Settings
from appliance.observe.metrics import BatchMetrics


@asynccontextmanager
async def open_batches(
    settings: Settings, clock: Clock, *, files: Files, door: OfflineDoor, callers: Callers, metrics: BatchMetrics
) -> AsyncIterator[BatchRunner]:
    """Open what is stored, and close it on leaving; `BatchRunner.run` does the work meanwhile.

    Raises:
        StorageError: The database cannot be opened.
    """
    database = await asyncio.to_thread(open_ledger, settings.batches_path)
    try:
        ledger = Ledger(database, clock)
        yield BatchRunner(settings, ledger, clock, files=files, door=door, callers=callers, metrics=metrics)
    finally:
        database.close()
