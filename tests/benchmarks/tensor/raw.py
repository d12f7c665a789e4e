"""Raw onnxruntime, in a process of its own: what the model costs without any server.

`python -m tests.benchmarks.tensor.raw` reads one job as JSON from standard input and writes its measurement as JSON.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import msgspec
import numpy as np

from appliance.core.errors import UnavailableError

TIMEOUT_S = 1800.0
CHECKOUT_MODULE = "tests.benchmarks.tensor.raw"
WARMING_RUNS = 3

Feeds = list[dict[str, Any]]


class TextsJob(msgspec.Struct, frozen=True, kw_only=True, tag="texts"):
    """Evaluate texts in batches, in the order they are in, at each batch size and with each number of lanes.

    Attributes:
        model: Path of the graph.
        threads: Of all evaluations together.
        rows: Token ids of each text.
        lanes: Evaluations at once, which share the threads.
        padded_to: Tokens of each row of a batch; 0 is the longest of the batch.
        seconds: The least time for a batch size; all texts are evaluated once in any case, and always all.
    """

    model: str
    threads: int
    rows: list[list[int]]
    batch_sizes: list[int]
    lanes: list[int]
    padded_to: int = 0
    seconds: float = 0.0


class SingleJob(msgspec.Struct, frozen=True, kw_only=True, tag="single"):
    """Evaluate one row of features again and again."""

    model: str
    threads: int
    features: list[float]
    runs: int


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a job found.

    Attributes:
        rates: Rows a second by the way they were evaluated.
        median_s: Of one evaluation, for a single row.
    """

    rates: dict[str, float] = {}
    median_s: float = 0.0

    @property
    def best_way(self) -> str:
        """Return the way that is fastest."""
        return max(self.rates, key=lambda way: self.rates[way])

    @property
    def best_rate(self) -> float:
        """Return the rows a second of that way."""
        return self.rates[self.best_way]


Job = TextsJob | SingleJob


async def measure(job: Job) -> Measured:
    """Have a job done in a process of its own.

    Raises:
        UnavailableError: It failed.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        CHECKOUT_MODULE,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            answer, _ = await process.communicate(msgspec.json.encode(job))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise UnavailableError("onnxruntime did not evaluate the model; the reason is above.")
    return msgspec.json.decode(answer, type=Measured)


def evaluate(job: Job) -> Measured:
    """Do a job here and now."""
    if isinstance(job, SingleJob):
        return Measured(median_s=_median_s(_session(job.model, job.threads), job))
    rates = {}
    for lanes in job.lanes:
        threads = max(1, job.threads // lanes)
        session = _session(job.model, threads)
        names = [each.name for each in session.get_inputs()]
        for size in job.batch_sizes:
            way = f"{size} rows, {lanes} at once, {threads} threads each"
            rates[way] = _rate(session, batches(job, size, names), job, lanes)
    return Measured(rates=rates)


def _session(model: str, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def lanes(threads: int) -> list[int]:
    """Return what is tried: one evaluation with all threads, and as many at once as there are."""
    return sorted({1, threads})


def batches(job: TextsJob, size: int, names: Sequence[str]) -> Feeds:
    """Return the inputs of each batch; those of the model are known by the names that encoders give them."""
    feeds = []
    for at in range(0, len(job.rows), size):
        rows = job.rows[at : at + size]
        ids = np.zeros((len(rows), job.padded_to or max(map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        feeds.append({name: known[name] for name in names})
    return feeds


def _rate(session: Any, feeds: Feeds, job: TextsJob, lanes: int) -> float:
    def run(feed: dict[str, Any]) -> None:
        session.run(None, feed)

    with ThreadPoolExecutor(lanes) as threads:
        for feed in feeds[:WARMING_RUNS]:
            run(feed)
        rows = 0
        began = time.perf_counter()
        while rows == 0 or time.perf_counter() - began < job.seconds:
            for _ in threads.map(run, feeds):
                pass
            rows += len(job.rows)
        return rows / (time.perf_counter() - began)


def _median_s(session: Any, job: SingleJob) -> float:
    (name,) = (each.name for each in session.get_inputs())
    feed = {name: np.array([job.features], np.float32)}
    times = []
    for _ in range(job.runs):
        began = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - began)
    return median(times)


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(evaluate(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))))
