"""A generation as an async iterator, which is what reads best in a test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from appliance.core.types import Delta, Generation


async def deltas_of(generation: Generation) -> AsyncIterator[Delta]:
    """Yield what comes, to the end; raises the ApplianceError that ended the work."""
    arrived = asyncio.Event()
    generation.notify(arrived.set)
    while True:
        arrived.clear()
        deltas = generation.take()
        for delta in deltas:
            yield delta
        if not deltas:
            if generation.ended:
                return
            await arrived.wait()
