"""What a server adds to the evaluation of one row."""

from __future__ import annotations

import asyncio
from statistics import median

import numpy as np

from appliance.bench.statistics import quantile
from tests.benchmarks.tensor import raw
from tests.benchmarks.tensor.models import TABULAR
from tests.benchmarks.tensor.peers import RAW, ServingPeer
from tests.benchmarks.tensor.requests import infer, tensors
from tests.benchmarks.tensor.wire import Wire
from tests.benchmarks.tensor.workload import Trial, Workload
from tests.benchmarks.workload import Quantity, Sample
from tests.tiny_onnx import TABULAR_FEATURES

MEDIAN, TAIL = "one row, median", "one row, 99th percentile"
WARMING = 50
_COUNTED = (
    "Milliseconds from sending a request with one row, as JSON, to the end of its answer: one client that keeps its "
    "connection, 2,000 requests one after another. onnxruntime: Session.run of the same row."
)


async def measure(trial: Trial) -> Sample:
    """Measure one contestant."""
    features = [0.25 * number for number in range(TABULAR_FEATURES)]
    if isinstance(trial.peer, ServingPeer):
        async with trial.peer.running() as server:
            await asyncio.to_thread(_times, server.port, features, WARMING)
            cpu_s = server.cpu_s()
            times = await asyncio.to_thread(_times, server.port, features, trial.effort.singles)
            details = {"server_cpu_ms": 1e3 * (server.cpu_s() - cpu_s) / len(times)}
        return Sample({MEDIAN: 1e3 * median(times), TAIL: 1e3 * quantile(times, 0.99)}, details)
    job = raw.SingleJob(
        model=str(trial.peer.models.path(TABULAR)),
        threads=trial.peer.threads,
        features=features,
        runs=trial.effort.singles,
    )
    return Sample({MEDIAN: 1e3 * (await raw.measure(job)).median_s})


def _times(port: int, features: list[float], count: int) -> list[float]:
    body = tensors({"features": np.array([features], np.float32)}, ["probabilities"])
    with Wire(port) as wire:
        return [wire.post(infer(TABULAR), [body])[0] for _ in range(count)]


WORKLOAD = Workload(
    name="tabular",
    counted=_COUNTED,
    quantities=[
        Quantity(MEDIAN, "ms", "greatest", 1.0, compared="difference"),
        Quantity(TAIL, "ms", "greatest", None),
    ],
    measure=measure,
    baseline=RAW,
)
