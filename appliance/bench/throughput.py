"""Throughput: the server against the engine's own limit, turn about."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field

import msgspec

from appliance.bench.client import Response
from appliance.bench.cpu import CpuMeter, CpuUse
from appliance.bench.report import Effort, Figure, Measurement, Progress, Subject, at_least
from appliance.bench.requests import chat, chat_tokens, check_complete
from appliance.bench.server import Server, running
from appliance.bench.statistics import spread
from appliance.bench.streams import stream_together, tokens_per_second
from appliance.core.errors import EngineError

STREAMS = (1, 4, 8)
LEAST_RATIO = 0.95
BARE_LOOP_TIMEOUT_S = 600.0
_COUNTED = (
    "Tokens a second of all streams together while all are decoding: after the stream that began last has begun and "
    "before the first one ends, so prompt reading is left out on both sides. The server is measured by its client over "
    "HTTP (streaming chat completions, temperature 0), which reads 20 times a second what has come; the bare loop is "
    "llama_decode and greedy sampling in a process of its own, with the same file, KV cells, threads, prompts, number "
    "of tokens and one token of each sequence a batch. Both are measured in turn, while the other one is idle; the "
    "KV cells hold nothing but these chats on both sides, and no tokens are guessed ahead. "
    "The ratio is the median of the ratios of the pairs."
)


@dataclass(slots=True)
class _Pairs:
    """What was measured at one number of streams."""

    server: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    server_use: list[CpuUse] = field(default_factory=list)
    bare_use: list[CpuUse] = field(default_factory=list)


async def measure(subject: Subject, effort: Effort, progress: Progress) -> Measurement:
    """Measure at each number of streams.

    Raises:
        UnavailableError: The server does not become ready, or an answer is not whole.
        EngineError: The bare loop failed.
    """
    figures: list[Figure] = []
    details: dict[str, object] = {"runs": effort.runs, "tokens_per_stream": effort.tokens}
    for streams in STREAMS:
        # A server of its own each: cells kept from other chats would slow the attention of these.
        async with running(subject.settings, max_sequences=max(STREAMS), speculation="off") as server:
            pairs = await _pairs(server, subject, effort, streams, progress)
        figures += _figures(pairs, streams)
        details[f"streams_{streams}"] = _cpu_use(pairs, streams * effort.tokens)
    return Measurement(name="throughput", counted=_COUNTED, figures=figures, details=details)


async def _pairs(server: Server, subject: Subject, effort: Effort, streams: int, progress: Progress) -> _Pairs:
    model = subject.model.full_name
    prompts = [await chat_tokens(server.port, model, number) for number in range(streams)]
    job = msgspec.json.encode(_bare_loop(subject, effort, prompts))
    await _answers(server, model, streams, tokens=1)  # warms the server up; the bare loop reads its prompts anyhow
    pairs = _Pairs()
    for number in range(effort.runs):
        progress(f"throughput, {streams} streams, pair {number + 1} of {effort.runs}")
        for side in ("server", "bare") if number % 2 == 0 else ("bare", "server"):
            meter = CpuMeter(server)
            if side == "server":
                responses = await _answers(server, model, streams, effort.tokens)
                pairs.server_use.append(meter.use())
                pairs.server.append(tokens_per_second(responses, effort.tokens))
            else:
                pairs.bare.append(await _bare(job))
                pairs.bare_use.append(meter.use())
    return pairs


def _figures(pairs: _Pairs, streams: int) -> list[Figure]:
    server, bare = spread(pairs.server), spread(pairs.bare)
    ratio = spread([ours / limit for ours, limit in zip(pairs.server, pairs.bare, strict=True)])
    return [
        Figure(name=f"server, {streams} streams", value=server.median, unit="tokens/s", spread=server),
        Figure(name=f"bare loop, {streams} streams", value=bare.median, unit="tokens/s", spread=bare),
        at_least(f"server / bare loop, {streams} streams", ratio.median, "", LEAST_RATIO, ratio),
    ]


def _cpu_use(pairs: _Pairs, tokens: int) -> dict[str, object]:
    """Return who used the CPU: what others did beside a measurement explains a figure that is out of line."""
    return {
        "server_cpu_ms_per_token": spread([1000 * each.server / tokens for each in pairs.server_use]),
        "client_cpu_ms_per_token": spread([1000 * each.client / tokens for each in pairs.server_use]),
        "server_cores_during_bare_loop": spread([each.server / each.seconds for each in pairs.bare_use]),
        "cores_of_other_programs": spread([each.other_cores for each in (*pairs.server_use, *pairs.bare_use)]),
    }


async def _answers(server: Server, model: str, streams: int, tokens: int) -> list[Response]:
    """Let the server answer so many chats at once."""
    responses = await stream_together(server.port, [chat(model, number, tokens) for number in range(streams)])
    for response in responses:
        check_complete(response, tokens)
    return responses


def _bare_loop(subject: Subject, effort: Effort, prompts: list[list[int]]) -> dict[str, object]:
    """Return the job for `appliance.engine.llama.bare_loop`."""
    settings = subject.settings
    return {
        "model": str(subject.model.files[0].path),
        "cells": settings.context_cells,
        "slots": max(STREAMS),
        "batch_tokens": settings.batch_tokens,
        "threads": subject.threads,
        "flash_attention": settings.flash_attention,
        "kv_cache_type": settings.kv_cache_type,
        "gpu_layers": settings.gpu_layers,
        "prompts": prompts,
        "tokens": effort.tokens,
    }


async def _bare(job: bytes) -> float:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "appliance.engine.llama.bare_loop",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(BARE_LOOP_TIMEOUT_S):
            output, errors = await process.communicate(job)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise EngineError(
            f"The bare loop ended with exit code {process.returncode}: {errors.decode(errors='replace')[-500:].strip()}"
        )
    result = msgspec.json.decode(output)
    return float(result["tokens"] / result["seconds"])
