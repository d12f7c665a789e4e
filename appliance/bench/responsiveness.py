"""Responsiveness: what others feel while a long prompt is read."""

from __future__ import annotations

import asyncio
import time

from appliance.bench.client import Connection, Response
from appliance.bench.report import Effort, Figure, Measurement, Progress, Subject, at_most
from appliance.bench.requests import CHAT, COMPLETIONS, chat, completion, context_length, filler_tokens, text_times
from appliance.bench.server import Server, running
from appliance.bench.statistics import quantile
from appliance.bench.streams import longest_gaps
from appliance.core.errors import UnavailableError

STREAMS = 8
MOST_SEQUENCES = 16
PROBE_EVERY_S = 0.01
LONGEST_HEALTH_MS = 50.0
LONGEST_GAP_MS = 300.0
TIMEOUT_S = 600.0
LONG_ANSWER_TOKENS = 8
_COUNTED = (
    "Eight chats stream when a long prompt arrives. From its sending to its first token: the time /health takes, on a "
    "connection of its own, every 10 ms, each counted from when it was due, so that a slow one also counts against "
    "those that it kept waiting; and the longest silence in any of the streams, at their client."
)


async def measure(subject: Subject, effort: Effort, progress: Progress) -> Measurement:
    """Measure once; the long prompt gives thousands of probes.

    Raises:
        UnavailableError: The server does not become ready, or nothing was streamed while the prompt was read.
    """
    model = subject.model.full_name
    progress("responsiveness")
    sequences = max(MOST_SEQUENCES, subject.settings.max_sequences)
    async with running(subject.settings, max_sequences=sequences) as server:
        room = min(await context_length(server.port, model), subject.settings.context_cells)
        long_prompt = await filler_tokens(server.port, model, 0, min(effort.long_prompt_tokens, room // 2))
        tokens = _stream_tokens(room, subject.settings.context_cells, len(long_prompt))
        answers: list[Response] = []
        connections = [await Connection.open(server.port) for _ in range(STREAMS)]
        try:
            async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as tasks:
                streams = [
                    tasks.create_task(_stream(connection, model, number, tokens, answers), name=f"stream {number}")
                    for number, connection in enumerate(connections)
                ]
                await asyncio.sleep(0)  # now each of them has sent its request
                for connection in connections:
                    await connection.begin()
                long, probes = await _read_long_prompt(server, model, long_prompt)
                for stream in streams:
                    stream.cancel()
        finally:
            for connection in connections:
                connection.close()
    return _measurement(long, answers, probes, prompt_tokens=len(long_prompt))


def _measurement(long: Response, answers: list[Response], probes: list[float], *, prompt_tokens: int) -> Measurement:
    first = text_times(long)[0]
    gaps = [1000 * each for each in longest_gaps(answers, long.sent_at, first)]
    if not gaps:
        raise UnavailableError("Nothing was streamed while the long prompt was read, so there is nothing to compare.")
    health = [1000 * each for each in probes]
    return Measurement(
        name="responsiveness",
        counted=_COUNTED,
        figures=[
            Figure(name="/health, median", value=quantile(health, 0.5), unit="ms"),
            at_most("/health, 99th percentile", quantile(health, 0.99), "ms", LONGEST_HEALTH_MS),
            at_most("longest gap in a stream", max(gaps), "ms", LONGEST_GAP_MS),
            Figure(name="first token of the long prompt", value=first - long.sent_at, unit="s"),
        ],
        details={
            "streams": STREAMS,
            "long_prompt_tokens": prompt_tokens,
            "health_probes": len(health),
            "health_longest_ms": max(health),
            "longest_gap_of_each_answer_ms": gaps,
            "events_streamed_meanwhile": sum(long.sent_at < at <= first for each in answers for at in text_times(each)),
        },
    )


def _stream_tokens(context: int, cells: int, long_prompt: int) -> int:
    """Return how long the streams' answers may be, so that all fit the cells beside the long prompt."""
    template = 128
    shared = (cells - long_prompt - LONG_ANSWER_TOKENS) // STREAMS - template
    return max(16, min(shared, context - 2 * template))


async def _stream(connection: Connection, model: str, number: int, tokens: int, answers: list[Response]) -> None:
    """Ask again and again, since on a fast machine an answer may end before the long prompt is read."""
    while True:
        answers.append(connection.send("POST", CHAT, chat(model, number, tokens)))
        await connection.wait()


async def _read_long_prompt(server: Server, model: str, prompt: list[int]) -> tuple[Response, list[float]]:
    """Send the long prompt and probe the server until its answer is whole; returns the answer and the probes' times."""
    probes: list[float] = []
    with await Connection.open(server.port) as connection, await Connection.open(server.port) as prober:
        long = connection.send("POST", COMPLETIONS, completion(model, prompt, LONG_ANSWER_TOKENS))
        async with asyncio.TaskGroup() as tasks:
            probing = tasks.create_task(_probe(prober, probes), name="probes")
            await connection.wait()
            probing.cancel()
    return long, probes


async def _probe(connection: Connection, seconds: list[float]) -> None:
    due = time.perf_counter()
    while True:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        response = await connection.request("GET", "/health")
        if response.status != 200:
            raise UnavailableError(f"/health answered {response.status} under load: {response.body.decode()}")
        seconds.append(response.ended_at - due)
        due += PROBE_EVERY_S
