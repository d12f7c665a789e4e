"""Overload: many more clients at once than the queue holds."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from appliance.bench.client import ConnectionLostError, Response, ask
from appliance.bench.report import Effort, Figure, Measurement, Progress, Subject, at_most
from appliance.bench.requests import CHAT, chat, incompleteness
from appliance.bench.server import Server, running
from appliance.bench.statistics import quantile

HANGS_AFTER_S = 300.0
SAMPLE_EVERY_S = 0.05
MOST_GROWTH_MB = 16.0
_COUNTED = (
    "So many clients connect at once, several times over, and ask for a streamed answer each. Answered: 200, every "
    "token, [DONE]. Refused: 429 with Retry-After. Anything else is lost: another status, a broken stream, a closed "
    "connection, or no end within 300 s. Memory grows by the resident bytes after the last wave less those after the "
    "first, or before it if there is only one."
)
Outcome = Literal["answered", "refused", "lost"]


@dataclass(frozen=True, slots=True)
class _End:
    """How one client fared; `why` says how it was lost."""

    outcome: Outcome
    seconds: float
    why: str = ""
    retry_after_s: int = 0


@dataclass(slots=True)
class _Memory:
    """Resident bytes of the server."""

    before: int
    peak: int
    after_waves: list[int]


async def measure(subject: Subject, effort: Effort, progress: Progress) -> Measurement:
    """Send the waves.

    Raises:
        UnavailableError: The server does not become ready.
    """
    ends: list[_End] = []
    async with running(subject.settings) as server:
        await ask(server.port, "POST", CHAT, chat(subject.model.full_name, 0, 4))
        before = server.memory().server
        memory = _Memory(before, before, [])
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(_watch(server, memory), name="memory")
            for number in range(effort.waves):
                progress(f"overload, wave {number + 1} of {effort.waves}")
                ends += await _wave(server.port, subject.model.full_name, effort)
                memory.after_waves.append(server.memory().server)
            watching.cancel()
        health = await ask(server.port, "GET", "/health")
    return _measurement(ends, memory, effort, health.status)


def _measurement(ends: list[_End], memory: _Memory, effort: Effort, health: int) -> Measurement:
    counts = Counter(each.outcome for each in ends)
    refused = [each for each in ends if each.outcome == "refused"]
    first = memory.after_waves[0] if effort.waves > 1 else memory.before
    return Measurement(
        name="overload",
        counted=_COUNTED,
        figures=[
            Figure(name="answered", value=counts["answered"], unit="clients"),
            Figure(name="refused with Retry-After", value=counts["refused"], unit="clients"),
            at_most("lost", counts["lost"], "clients", 0),
            Figure(name="memory before", value=memory.before / 1e6, unit="MB"),
            Figure(name="memory at its peak", value=memory.peak / 1e6, unit="MB"),
            at_most("memory growth", (memory.after_waves[-1] - first) / 1e6, "MB", MOST_GROWTH_MB),
        ],
        details={
            "clients": effort.clients,
            "waves": effort.waves,
            "tokens_per_answer": effort.answer_tokens,
            "lost_because": dict(Counter(each.why for each in ends if each.outcome == "lost")),
            "slowest_answer_s": max((each.seconds for each in ends if each.outcome == "answered"), default=None),
            "refusal_s_p99": quantile([each.seconds for each in refused], 0.99) if refused else None,
            "retry_after_s": sorted({each.retry_after_s for each in refused}),
            "memory_after_each_wave_mb": [each / 1e6 for each in memory.after_waves],
            "health_afterwards": health,
        },
    )


async def _wave(port: int, model: str, effort: Effort) -> list[_End]:
    async with asyncio.TaskGroup() as tasks:
        clients = [
            tasks.create_task(_client(port, model, number, effort.answer_tokens), name=f"client {number}")
            for number in range(effort.clients)
        ]
    return [each.result() for each in clients]


async def _client(port: int, model: str, number: int, tokens: int) -> _End:
    began = time.perf_counter()
    try:
        async with asyncio.timeout(HANGS_AFTER_S):
            response = await ask(port, "POST", CHAT, chat(model, number, tokens))
    except TimeoutError:
        return _End("lost", time.perf_counter() - began, f"no end within {HANGS_AFTER_S:g} s")
    except ConnectionLostError as error:
        return _End("lost", time.perf_counter() - began, str(error))
    return _end(response, tokens)


def _end(response: Response, tokens: int) -> _End:
    if response.status == 429:
        retry_after = response.headers.get("retry-after", "")
        if retry_after.isdecimal():
            return _End("refused", response.seconds, retry_after_s=int(retry_after))
        return _End("lost", response.seconds, f"429 with Retry-After {retry_after!r}")
    why = incompleteness(response, tokens)
    return _End("lost" if why else "answered", response.seconds, why)


async def _watch(server: Server, memory: _Memory) -> None:
    while True:
        memory.peak = max(memory.peak, server.memory().server)
        await asyncio.sleep(SAMPLE_EVERY_S)
