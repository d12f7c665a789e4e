"""Decoding beside a busy neighbour: another program on the box that wants a core for itself."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from appliance.bench.streams import stream_together, tokens_per_second
from tests.benchmarks.decode import PROMPT
from tests.benchmarks.workload import Quantity, Sample, Trial, Workload, without_speculation

CLIENTS = (1, 8)
_COUNTED = (
    "Tokens a second as for decoding, while another program computes without end on one thread. There are no more "
    "cores than the servers have threads, so all share them. Our prompt lookup is off."
)


async def measure(trial: Trial) -> Sample:
    """Measure at each number of clients."""
    values: dict[str, float] = {}
    tokens = trial.effort.neighbour_answer
    for clients in CLIENTS:
        requests = [
            trial.peer.request(trial.ask(f"neighbour {clients} {number}", PROMPT), tokens) for number in range(clients)
        ]
        async with trial.peer.fresh() as server, _neighbour():
            responses = await stream_together(server.port, requests)
        for response in responses:
            trial.peer.check(response, tokens)
        values[_rate(clients)] = tokens_per_second(responses, tokens)
    return Sample(values)


@asynccontextmanager
async def _neighbour() -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
    try:
        yield
    finally:
        process.kill()
        await process.wait()


def _rate(clients: int) -> str:
    return f"{clients} client{'s' if clients > 1 else ''} beside a busy program"


WORKLOAD = Workload(
    name="neighbour",
    counted=_COUNTED,
    quantities=[Quantity(_rate(clients), "tokens/s", "least", 1.0) for clients in CLIENTS],
    measure=measure,
    contestants=without_speculation,
)
