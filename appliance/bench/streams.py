"""Many streamed answers at once, read by a client that takes little CPU from the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from appliance.bench.client import Connection, Response
from appliance.bench.requests import CHAT, text_times
from appliance.bench.statistics import longest_gap, steady_rate
from appliance.core.errors import UnavailableError

ANSWERS_TIMEOUT_S = 600.0
LOOK_EVERY_S = 0.05
"""How often the client reads what has come: a client that woke up for each token would take CPU from the server, which
real clients, on machines of their own, do not."""


@asynccontextmanager
async def deadline(seconds: float = ANSWERS_TIMEOUT_S) -> AsyncIterator[None]:
    """Give up on answers that do not come.

    Raises:
        UnavailableError: The body took longer than so many seconds.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise UnavailableError(f"The server did not answer within {seconds:g} s.") from error


async def stream_together(port: int, requests: Sequence[Mapping[str, Any]], *, patient: bool = True) -> list[Response]:
    """Send all chat requests at once and return their whole answers; the caller checks them.

    Args:
        port: Of the server.
        requests: For `/v1/chat/completions`, streamed.
        patient: Look only every `LOOK_EVERY_S` once an answer has begun, so that times after that are so much late.

    Raises:
        ConnectionLostError: A connection ended before its answer was whole.
        UnavailableError: The answers took longer than `ANSWERS_TIMEOUT_S`.
    """
    connections = [await Connection.open(port) for _ in requests]
    try:
        responses = [
            connection.send("POST", CHAT, request) for connection, request in zip(connections, requests, strict=True)
        ]
        async with deadline():
            for connection in connections:
                await connection.begin()
                connection.patient = patient
            while patient and not all(each.answered for each in connections):
                await asyncio.sleep(LOOK_EVERY_S)
                for connection in connections:
                    connection.look()
            for connection in connections:
                await connection.wait()
    finally:
        for connection in connections:
            connection.close()
    return responses


def tokens_per_second(responses: Sequence[Response], tokens: int) -> float:
    """Return the `steady_rate` of answers of `tokens` tokens each.

    Raises:
        UnavailableError: They came too fast to be timed.
    """
    try:
        return steady_rate([text_times(each) for each in responses], tokens)
    except ValueError as error:
        raise UnavailableError(f"The answers of {tokens} tokens came too fast to be timed: {error}.") from error


def longest_gaps(answers: Iterable[Response], begin: float, end: float) -> Iterator[float]:
    """Yield the longest silence of each answer, from its first to its last token, as far as that lies within."""
    for answer in answers:
        times = text_times(answer)
        if not times:
            continue
        earliest = max(begin, times[0])
        latest = min(end, times[-1]) if answer.ended_at else end
        if earliest < latest:
            yield longest_gap(times, earliest, latest)
