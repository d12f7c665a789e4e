"""Real engines on tiny models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from appliance.core.types import Delta, FinishReason, SamplingParams, TokenLogprob, Usage
from appliance.engine.llama.config import EngineConfig
from appliance.engine.llama.engine import LlamaEngine
from appliance.engine.llama.generation import LlamaGeneration
from appliance.observe.metrics import Metrics
from tests.deltas import deltas_of

CONFIG = EngineConfig(
    cells=512,
    sequences=4,
    batch_tokens=64,
    threads=1,
    gpu_layers=0,
    target_inter_token_latency_s=0.5,
    queue_size=8,
)
DEADLINE_S = 30.0


@dataclass(frozen=True)
class Answer:
    """One choice, put together again."""

    text: str
    reason: FinishReason | None
    deltas: list[Delta]

    @property
    def told(self) -> list[TokenLogprob]:
        return [each for delta in self.deltas for each in delta.logprobs]

    @property
    def token_ids(self) -> list[int]:
        return [each.token_id for each in self.told]

    @property
    def logprobs(self) -> list[float]:
        return [each.logprob for each in self.told]


async def collect(generation: LlamaGeneration, choices: int = 1) -> list[Answer]:
    """Read a generation to its end."""
    deltas: list[list[Delta]] = [[] for _ in range(choices)]
    async with asyncio.timeout(DEADLINE_S):
        async for delta in deltas_of(generation):
            deltas[delta.index].append(delta)
    return [Answer("".join(d.text for d in each), each[-1].finish_reason, each) for each in deltas]


class EngineUnderTest:
    """An engine with shorthands."""

    def __init__(self, engine: LlamaEngine, metrics: Metrics) -> None:
        self.engine = engine
        self.metrics = metrics

    async def tokens(self, text: str) -> list[int]:
        return await self.engine.tokenize(text, add_special=True, parse_special=False)

    async def ask(self, text: str, sampling: SamplingParams, n: int = 1) -> tuple[list[Answer], Usage]:
        generation = self.engine.submit(await self.tokens(text), sampling, n=n)
        return await collect(generation, n), generation.usage

    async def greedy(self, text: str, tokens: int = 24) -> Answer:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, top_logprobs=2, ignore_eos=True)
        return (await self.ask(text, sampling))[0][0]

    async def until(self, true: Callable[[], bool]) -> None:
        """Give the loop its turns until something is true."""
        async with asyncio.timeout(DEADLINE_S):
            while not true():  # noqa: ASYNC110  (what is waited for happens in another thread, without an event)
                await asyncio.sleep(0)


@asynccontextmanager
async def running(path: Path, **changes: object) -> AsyncIterator[EngineUnderTest]:
    metrics = Metrics()
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    engine = await LlamaEngine.load("tiny:1", path, config, metrics.for_model("tiny:1"))
    try:
        yield EngineUnderTest(engine, metrics)
    finally:
        if not engine.ended.done():
            await engine.close()


@pytest.fixture
async def tiny(tiny_model_path: Path) -> AsyncIterator[EngineUnderTest]:
    async with running(tiny_model_path) as subject:
        yield subject
        await subject.until(lambda: subject.engine._worker.runner.scheduler.idle)
        subject.engine._worker.runner.scheduler.check_integrity()
