"""Start and memory: how soon the server is ready, and what it occupies."""

from __future__ import annotations

import asyncio

from appliance.bench.client import Connection
from appliance.bench.report import Effort, Figure, Measurement, Progress, Subject, at_most
from appliance.bench.requests import (
    CHAT,
    COMPLETIONS,
    chat,
    check_complete,
    completion,
    context_length,
    filler_tokens,
)
from appliance.bench.server import ResidentMemory, Server, running
from appliance.bench.statistics import spread

LONGEST_START_S = 3.0
MOST_EMPTY_MB = 120.0
MOST_LOADED_MB = 450.0
ANSWERS_TIMEOUT_S = 900.0
_COUNTED = (
    "Ready: seconds from starting the program to the first 200 of /health, which it gives once the model is loaded and "
    "has been evaluated; the file is in the kernel's cache. Memory: resident bytes of the server's process in units of "
    "a million, with the pages of the model file; the process that renders chat templates is listed apart."
)


async def measure(subject: Subject, effort: Effort, progress: Progress) -> Measurement:
    """Start the server without a model once, and with it several times.

    Raises:
        UnavailableError: It does not become ready, or an answer is not whole.
    """
    progress("start, without a model")
    async with running(subject.settings, model="") as server:
        empty = server.memory()
    starts, loaded, answered = [], [], []
    filled, cells = ResidentMemory(0, 0), 0
    for number in range(effort.runs):
        progress(f"start, {number + 1} of {effort.runs}")
        async with running(subject.settings) as server:
            starts.append(server.ready_s)
            loaded.append(server.memory())
            await _answer(server, subject.model.full_name)
            answered.append(server.memory())
            if number + 1 == effort.runs:
                progress("start, filling the KV cells")
                cells = await _fill(server, subject, effort)
                filled = server.memory()
    after_answer = spread([_megabytes(each.server) for each in answered])
    return Measurement(
        name="start",
        counted=_COUNTED,
        figures=[
            at_most("ready", spread(starts).median, "s", LONGEST_START_S, spread(starts)),
            at_most("memory without a model", _megabytes(empty.server), "MB", MOST_EMPTY_MB),
            at_most("memory with the model, after an answer", after_answer.median, "MB", MOST_LOADED_MB, after_answer),
            at_most("memory with the KV cells in use", _megabytes(filled.server), "MB", MOST_LOADED_MB),
            Figure(name="template process", value=_megabytes(filled.children), unit="MB"),
        ],
        details={
            "runs": effort.runs,
            "cells_filled": cells,
            "loaded_before_any_answer_mb": spread([_megabytes(each.server) for each in loaded]),
        },
    )


async def _answer(server: Server, model: str) -> None:
    with await Connection.open(server.port) as connection:
        check_complete(await connection.request("POST", CHAT, chat(model, 0, 8)), 8)


async def _fill(server: Server, subject: Subject, effort: Effort) -> int:
    """Put as many different prompts into the KV cells as there are sequences; returns how many tokens they have."""
    model, slots = subject.model.full_name, subject.settings.max_sequences
    longest = min(await context_length(server.port, model), subject.settings.context_cells // slots) - 2
    count = max(1, min(longest, effort.fill_tokens))
    prompts = [await filler_tokens(server.port, model, number, count) for number in range(slots)]
    connections = [await Connection.open(server.port) for _ in prompts]
    try:
        responses = [
            connection.send("POST", COMPLETIONS, completion(model, prompt, 1))
            for connection, prompt in zip(connections, prompts, strict=True)
        ]
        async with asyncio.timeout(ANSWERS_TIMEOUT_S):
            for connection in connections:
                await connection.wait()
    finally:
        for connection in connections:
            connection.close()
    for response in responses:
        check_complete(response, 1)
    return sum(len(prompt) for prompt in prompts)


def _megabytes(count: int) -> float:
    return count / 1e6
