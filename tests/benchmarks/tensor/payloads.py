"""Large tensors: binary ones in either direction, and as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from appliance.bench.client import ConnectionLostError
from tests.benchmarks.tensor.models import ECHO, RAMP
from tests.benchmarks.tensor.peers import MLSERVER, Appliance, Peer, ServingPeer
from tests.benchmarks.tensor.requests import HEADER_LENGTH, binary_head, infer, ramp_body, tensors
from tests.benchmarks.tensor.wire import Wire
from tests.benchmarks.tensor.workload import Trial, Workload
from tests.benchmarks.workload import Quantity, Sample

MEGABYTE = 2**20
WARMING = 2
BOTH, UP, DOWN = "through an identity model", "to the server", "from the server"
JSON = "through an identity model, as JSON"
_BINARY = (
    "Megabytes (2**20 bytes) a second of FP32 tensors of 16 MB as binary data, one request after another, by the "
    "median of 30. Through an identity model: 32 MB, there and back. To the server: an output of one element. From the "
    "server: a model that fills a tensor of the shape asked for. Client and server share the cores. MLServer has no "
    "binary data over HTTP."
)
_JSON = (
    "Megabytes (2**20 bytes) of FP32 elements a second, there and back, of a tensor of 262,144 as a flat JSON list "
    "through an identity model, one request after another, by the median of 30; the same bytes to both servers."
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request that is sent again and again.

    Attributes:
        megabytes: Of elements, sent and received.
        answer_bytes: The least that the body of an answer has.
    """

    path: str
    parts: Sequence[bytes | memoryview]
    headers: str
    megabytes: float
    answer_bytes: int


async def measure_binary(trial: Trial) -> Sample:
    """Measure binary tensors."""
    array = np.linspace(-1, 1, trial.effort.binary_mb * MEGABYTE // 4, dtype=np.float32)[np.newaxis]
    megabytes = float(trial.effort.binary_mb)
    content = array.data.cast("B")
    exchanges = {
        BOTH: Exchange(*_with_head(binary_head(array, "x", "y"), content), 2 * megabytes, array.nbytes),
        UP: Exchange(*_with_head(binary_head(array, "x", "first"), content), megabytes, 1),
        DOWN: Exchange(infer(RAMP), [ramp_body(array.shape)], "", megabytes, array.nbytes),
    }
    return await _measure(trial, exchanges)


async def measure_json(trial: Trial) -> Sample:
    """Measure tensors as JSON."""
    array = np.random.default_rng(trial.corpus.run).standard_normal((1, trial.effort.json_elements), np.float32)
    body = tensors({"x": array}, ["y"])
    exchange = Exchange(infer(ECHO), [body], "", 2 * array.nbytes / MEGABYTE, array.size)
    return await _measure(trial, {JSON: exchange})


async def _measure(trial: Trial, exchanges: dict[str, Exchange]) -> Sample:
    assert isinstance(trial.peer, ServingPeer)
    values, cpu_ms = {}, {}
    async with trial.peer.running() as server:
        for name, exchange in exchanges.items():
            await asyncio.to_thread(_median_s, server.port, exchange, WARMING)
            cpu_s = server.cpu_s()
            seconds = await asyncio.to_thread(_median_s, server.port, exchange, trial.effort.payloads)
            values[name] = exchange.megabytes / seconds
            cpu_ms[name] = 1e3 * (server.cpu_s() - cpu_s) / trial.effort.payloads
    return Sample(values, {"server_cpu_ms": cpu_ms})


def _with_head(head: bytes, content: memoryview) -> tuple[str, Sequence[bytes | memoryview], str]:
    return infer(ECHO), [head, content], f"{HEADER_LENGTH}: {len(head)}\r\n"


def _median_s(port: int, exchange: Exchange, count: int) -> float:
    times = []
    with Wire(port, most_bytes=64 * MEGABYTE) as wire:
        for _ in range(count):
            seconds, body = wire.post(exchange.path, exchange.parts, exchange.headers)
            times.append(seconds)
            _check(body, exchange)
    return median(times)


def _check(body: memoryview, exchange: Exchange) -> None:
    if len(body) < exchange.answer_bytes:
        raise ConnectionLostError(f"The answer has {len(body)} bytes, not at least {exchange.answer_bytes}.")


def _servers(peers: Sequence[Peer]) -> list[Peer]:
    return [each for each in peers if isinstance(each, ServingPeer)]


def ours_alone(peers: Sequence[Peer]) -> list[Peer]:
    """Choose the appliance."""
    return [each for each in peers if isinstance(each, Appliance)]


BINARY = Workload(
    name="binary",
    counted=_BINARY,
    quantities=[Quantity(name, "MB/s", "least", 400.0, compared="value") for name in (BOTH, UP, DOWN)],
    measure=measure_binary,
    contestants=ours_alone,
)
JSON_TENSORS = Workload(
    name="json",
    counted=_JSON,
    quantities=[Quantity(JSON, "MB/s", "least", 2.0)],
    measure=measure_json,
    baseline=MLSERVER,
    contestants=_servers,
)
