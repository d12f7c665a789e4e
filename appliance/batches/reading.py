"""Reading a batch's input line by line, in a thread where it is large."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from appliance.batches.lines import Line, LineCutter
from appliance.core.batches import Batch
from appliance.core.retrieval import Files


async def lines_of(files: Files, batch: Batch, most_bytes: int) -> AsyncGenerator[Line, None]:
    """Yield the lines of a batch's input. Raises NotFoundError if its owner has erased it, also meanwhile."""
    cutter = LineCutter(most_bytes)
    async for piece in files.content(batch.input_file, tenant=batch.tenant):
        for line in await asyncio.to_thread(lambda: list(cutter.feed(piece))):  # noqa: B023  (it is waited for)
            files.get(batch.input_file, tenant=batch.tenant)
            yield line
    for line in cutter.close():
        yield line
