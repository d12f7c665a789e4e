"""The load driver: clients that send one request after another, for a while; the same for every server.

It shares the cores with the servers, so bodies are made before, and answers are looked into afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle

from appliance.bench.client import Connection, ConnectionLostError, Response
from appliance.bench.server import Server
from appliance.bench.streams import deadline

TIMEOUT_S = 600.0


@dataclass(slots=True)
class Load:
    """What clients have seen.

    Attributes:
        answers: When each answer ended, by `time.perf_counter()`, and the seconds since its request was sent.
        ended: Set to let each client stop after its answer.
    """

    answers: list[tuple[float, float]] = field(default_factory=list)
    ended: bool = False

    def times(self, begin: float, end: float) -> list[float]:
        """Return the seconds of each answer that ended in that time.

        Raises:
            ConnectionLostError: There is none.
        """
        times = [seconds for at, seconds in self.answers if begin <= at < end]
        if not times:
            raise ConnectionLostError(f"No answer came within {end - begin:.1f} s.")
        return times

    def rate(self, begin: float, end: float) -> float:
        """Return the answers a second in that time. Raises as `times`."""
        return len(self.times(begin, end)) / (end - begin)


@dataclass(frozen=True, slots=True)
class Steady:
    """What a load came to: answers a second, the seconds of each, and the CPU seconds of the server for each."""

    rate: float
    times: list[float]
    cpu_s: float


@asynccontextmanager
async def offering(port: int, path: str, bodies: Sequence[bytes], clients: int) -> AsyncIterator[Load]:
    """Keep so many clients busy, each on a connection of its own, until the body has ended.

    Args:
        port: Of the server.
        path: Where to POST.
        bodies: As JSON; one after another, by whichever client is free, and again from the first.
        clients: Requests at once.

    Raises:
        ConnectionLostError: An answer was not whole, or its status was not 200.
        UnavailableError: The server did not answer.
    """
    upcoming = cycle(bodies)
    load = Load()
    async with deadline(TIMEOUT_S), asyncio.TaskGroup() as tasks:
        for number in range(clients):
            tasks.create_task(_client(port, path, upcoming, load), name=f"client {number}")
        try:
            yield load
        finally:
            load.ended = True


async def offer(
    server: Server, path: str, bodies: Sequence[bytes], *, clients: int, warm_s: float, steady_s: float
) -> Steady:
    """Keep clients busy for a while, of which the first `warm_s` seconds do not count. Raises as `offering`."""
    async with offering(server.port, path, bodies, clients) as load:
        await asyncio.sleep(warm_s)
        begin, cpu_s = time.perf_counter(), server.cpu_s()
        await asyncio.sleep(steady_s)
        end, cpu_s = time.perf_counter(), server.cpu_s() - cpu_s
    times = load.times(begin, end)
    return Steady(load.rate(begin, end), times, cpu_s / len(times))


async def once(port: int, path: str, body: bytes) -> Response:
    """Send one request and return its answer.

    Raises:
        ConnectionLostError: It was not whole, or its status was not 200.
        UnavailableError: The server did not answer.
    """
    async with deadline(TIMEOUT_S):
        with await Connection.open(port) as connection:
            response = await connection.request("POST", path, body)
    _check(response)
    return response


async def _client(port: int, path: str, upcoming: Iterator[bytes], load: Load) -> None:
    with await Connection.open(port) as connection:
        while not load.ended:
            response = await connection.request("POST", path, next(upcoming))
            _check(response)
            load.answers.append((response.ended_at, response.seconds))


def _check(response: Response) -> None:
    if response.status != 200:
        body = response.body[:300].decode(errors="replace")
        raise ConnectionLostError(f"The server answered {response.status}: {body}")
