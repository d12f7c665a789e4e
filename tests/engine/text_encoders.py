"""Real encoders over real sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.onnx.config import SessionConfig
from appliance.engine.onnx.encoder import Input, OnnxEncoder
from appliance.engine.onnx.engine import OnnxEngine
from appliance.observe.metrics import Metrics


@asynccontextmanager
async def encoding(
    folder: Path, *, graph: Path | None = None, most_tokens: int = 2048, **config: Any
) -> AsyncIterator[OnnxEncoder]:
    """Run the model of a folder: `model.onnx`, or another graph with the folder's files."""
    engine = await OnnxEngine.load(
        "tiny:1",
        graph or folder / "model.onnx",
        SessionConfig(providers="cpu", **config),
        Metrics().for_tensors("tiny:1"),
        CpuBudget(1),
    )
    try:
        encoder = OnnxEncoder(engine, folder, most_tokens=most_tokens)
        await encoder.prepare()
        yield encoder
    finally:
        await engine.close()


async def vectors(encoder: OnnxEncoder, inputs: Sequence[Input], *, truncate: bool = False) -> npt.NDArray[np.float32]:
    """Return a vector a row."""
    tokens, _ = await encoder.tokenize(inputs, truncate=truncate)
    found = await encoder.embed(tokens)
    return np.array([np.frombuffer(each, np.float32) for each in found])
