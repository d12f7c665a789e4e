"""Many passages of mixed lengths in one request."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.bench.client import ConnectionLostError
from tests.benchmarks.tensor import raw
from tests.benchmarks.tensor.load import once
from tests.benchmarks.tensor.models import ENCODER
from tests.benchmarks.tensor.peers import RAW, MLServer, Peer, ServingPeer
from tests.benchmarks.tensor.requests import EMBEDDINGS, check_embedding, embeddings, vector_of_embeddings
from tests.benchmarks.tensor.workload import Trial, Workload
from tests.benchmarks.workload import Quantity, Sample

BATCH_SIZE = 32
RATE = "passages"
_COUNTED = (
    "Passages a second of one request to /v1/embeddings with 512 of them, of 8 to 250 tokens, each length about as "
    "often as another, in no order. onnxruntime: batches of 32 in that order, each padded to its longest, one at once "
    "with all threads or as many as there are threads, whichever is faster; tokenising is not in its time. Our cache "
    "of embeddings is off."
)


async def measure(trial: Trial) -> Sample:
    """Measure one contestant."""
    passages = trial.corpus.passages
    if isinstance(trial.peer, ServingPeer):
        return Sample({RATE: await _measure_served(trial, passages)})
    rows = trial.corpus.tokens.ids(passages)
    model = str(trial.peer.models.encoder)
    threads = trial.peer.threads
    job = raw.TextsJob(model=model, threads=threads, rows=rows, batch_sizes=[BATCH_SIZE], lanes=raw.lanes(threads))
    return Sample({RATE: (await raw.measure(job)).best_rate}, {"tokens": sum(map(len, rows))})


async def _measure_served(trial: Trial, passages: list[str]) -> float:
    assert isinstance(trial.peer, ServingPeer)
    async with trial.peer.running() as server:
        await once(server.port, EMBEDDINGS, embeddings(["Hello!"]))
        response = await once(server.port, EMBEDDINGS, embeddings(passages))
    check_embedding(vector_of_embeddings(response.body))
    answered = len(response.json()["data"])
    if answered != len(passages):
        raise ConnectionLostError(f"{ENCODER} embedded {answered} of {len(passages)} passages.")
    return answered / response.seconds


def _without_mlserver(peers: Sequence[Peer]) -> list[Peer]:
    return [each for each in peers if not isinstance(each, MLServer)]


WORKLOAD = Workload(
    name="passages",
    counted=_COUNTED,
    quantities=[Quantity(RATE, "1/s", "least", 1.5)],
    measure=measure,
    baseline=RAW,
    contestants=_without_mlserver,
)
