"""Real embedders on tiny models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from appliance.core.types import Vector
from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama_embedding.engine import Input, LlamaEmbedder
from appliance.engine.llama_embedding.worker import EmbeddingConfig
from appliance.observe.metrics import Metrics

CONFIG = EmbeddingConfig(longest_input=256, batch_tokens=64, threads=1, queue_size=8)

TEXTS = [
    "the quick brown fox",
    "why does the dog sleep",
    "the",
    "please answer the question in one sentence and say why the answer is the right one for this user " * 2,
    "hello there how are you today",
    "the quick brown fox jumps",
]


class EmbedderUnderTest:
    """An embedder with shorthands."""

    def __init__(self, embedder: LlamaEmbedder, metrics: Metrics) -> None:
        self.embedder = embedder
        self.metrics = metrics

    async def vectors(self, inputs: Sequence[Input], *, truncate: bool = False) -> npt.NDArray[np.float32]:
        tokens, _ = await self.embedder.tokenize(inputs, truncate=truncate)
        return as_rows(await self.embedder.embed(tokens))

    async def vector(self, text: Input) -> npt.NDArray[np.float32]:
        row: npt.NDArray[np.float32] = (await self.vectors([text]))[0]
        return row


def as_rows(vectors: Sequence[Vector]) -> npt.NDArray[np.float32]:
    return np.array([np.frombuffer(each, np.float32) for each in vectors])


@asynccontextmanager
async def embedding(
    path: Path, *, shared: LlamaModel | None = None, cpu: CpuBudget | None = None, **changes: object
) -> AsyncIterator[EmbedderUnderTest]:
    metrics = Metrics()
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    embedder = await LlamaEmbedder.load(
        "tiny:1", path, config, metrics.for_model("tiny:1"), gpu_layers=0, shared=shared, cpu=cpu
    )
    try:
        yield EmbedderUnderTest(embedder, metrics)
    finally:
        if not embedder.ended.done():
            await embedder.close()
