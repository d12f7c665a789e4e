"""Embedding throughput of many clients with one sentence each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from appliance.bench.server import Server
from appliance.bench.statistics import quantile
from tests.benchmarks.tensor import raw
from tests.benchmarks.tensor.load import Steady, offer, once
from tests.benchmarks.tensor.models import EMBEDDING, ENCODER, HIDDEN_STATE, POOLED
from tests.benchmarks.tensor.peers import MLSERVER, RAW, STOCK, Appliance, MLServer, Peer, ServingPeer
from tests.benchmarks.tensor.requests import (
    EMBEDDINGS,
    check_embedding,
    embeddings,
    encoder_tensors,
    infer,
    vector_of_embeddings,
    vector_of_tensors,
)
from tests.benchmarks.tensor.workload import SENTENCE_TOKENS, Corpus, Trial, Workload
from tests.benchmarks.workload import Quantity, Sample

BATCH_SIZES = [1, 2, 4, 8, 16, 32]
_COUNTED = (
    "Answers a second of 32 clients, each with one sentence of at most 32 tokens after another, and the 99th "
    "percentile of their times. /v2: the same bytes to both servers, tokens padded to 32 in JSON; for the hidden "
    "states of the catalog's graph, or for an embedding of the same graph with its pooling inside. /v1/embeddings: the "
    "text; MLServer has no such door, so its embeddings over /v2 stand in. It runs as it comes, and once more with the "
    "best of twelve tunings. onnxruntime: the same tokens in arrival order, at the best batch size of 1 to 32, one "
    "evaluation at once with all threads or as many as there are threads; padded to 32 beside /v2, to the longest of "
    "the batch beside /v1; tokenising is not in its time. Our cache of embeddings is off."
)


@dataclass(frozen=True, slots=True)
class Door:
    """A way in.

    Attributes:
        model: Whose graph is evaluated.
        output: Of the graph, where tensors are asked for; empty for text.
        padded_to: Tokens of each row; 0 is the longest of a batch.
    """

    name: str
    model: str
    output: str
    padded_to: int

    @property
    def tail(self) -> str:
        """Return the name of its slowest answers."""
        return f"{self.name}, 99th percentile"

    @property
    def path(self) -> str:
        """Return where to POST."""
        return infer(self.model) if self.output else EMBEDDINGS

    def bodies(self, corpus: Corpus) -> list[bytes]:
        """Return a request for each sentence."""
        if not self.output:
            return [embeddings([sentence]) for sentence in corpus.sentences]
        rows = corpus.tokens.ids(corpus.sentences)
        return [encoder_tensors(ids, self.padded_to, self.output) for ids in rows]


EMBEDDED = Door("/v2, embedding", POOLED, EMBEDDING, SENTENCE_TOKENS)
HIDDEN = Door("/v2, hidden states", ENCODER, HIDDEN_STATE, SENTENCE_TOKENS)
TEXT = Door("/v1/embeddings", ENCODER, "", 0)


async def measure(trial: Trial) -> Sample:
    """Measure one contestant."""
    if not isinstance(trial.peer, ServingPeer):
        return await _measure_raw(trial)
    doors = (EMBEDDED, HIDDEN, TEXT) if isinstance(trial.peer, Appliance) else (EMBEDDED, HIDDEN)
    async with trial.peer.running() as server:
        loads = {door: await _measure_door(server, door, trial.corpus) for door in doors}
    loads.setdefault(TEXT, loads[EMBEDDED])
    rates = {door.name: load.rate for door, load in loads.items()}
    tails = {door.tail: 1e3 * quantile(load.times, 0.99) for door, load in loads.items()}
    details = {"server_cpu_ms": {door.name: 1e3 * load.cpu_s for door, load in loads.items()}}
    return Sample({**rates, **tails}, details)


async def throughput(peer: MLServer, corpus: Corpus) -> float:
    """Return the embeddings a second that MLServer reaches with a tuning."""
    async with peer.running() as server:
        return (await _measure_door(server, EMBEDDED, corpus)).rate


async def _measure_raw(trial: Trial) -> Sample:
    values, details = {}, {}
    for door in (EMBEDDED, TEXT):
        job = raw.TextsJob(
            model=str(trial.peer.models.path(door.model)),
            threads=trial.peer.threads,
            rows=trial.corpus.tokens.ids(trial.corpus.sentences),
            batch_sizes=BATCH_SIZES,
            lanes=raw.lanes(trial.peer.threads),
            padded_to=door.padded_to,
            seconds=trial.effort.raw_s,
        )
        measured = await raw.measure(job)
        values[door.name] = measured.best_rate
        details[door.name] = {"rates": measured.rates, "best": measured.best_way}
    return Sample(values, details)


async def _measure_door(server: Server, door: Door, corpus: Corpus) -> Steady:
    bodies, effort = door.bodies(corpus), corpus.effort
    answer = (await once(server.port, door.path, bodies[0])).body
    if door is not HIDDEN:
        check_embedding(vector_of_tensors(answer) if door.output else vector_of_embeddings(answer))
    return await offer(
        server, door.path, bodies, clients=effort.clients, warm_s=effort.warm_s, steady_s=effort.steady_s
    )


def _beside_mlserver(door: Door) -> list[Quantity]:
    """Return what is promised of a door beside MLServer as it comes, and how it stands beside MLServer tuned."""

    def rate(target: float | None, baseline: str) -> Quantity:
        name = f"{door.name}, to {baseline}"
        return Quantity(name, "1/s", "least", target, baseline=baseline, values_of=door.name)

    def tail(target: float | None, baseline: str) -> Quantity:
        name = f"{door.tail}, to {baseline}"
        return Quantity(name, "ms", "greatest", target, baseline=baseline, values_of=door.tail)

    return [rate(2.0, STOCK), rate(None, MLSERVER), tail(1.0, STOCK), tail(1.0, MLSERVER)]


def _with_stock(peers: Sequence[Peer]) -> list[Peer]:
    """Return the contestants, and MLServer as it comes beside the one that is tuned."""
    return [*peers, *(each.as_it_comes() for each in peers if isinstance(each, MLServer))]


WORKLOAD = Workload(
    name="sentences",
    counted=_COUNTED,
    quantities=[
        Quantity(EMBEDDED.name, "1/s", "least", 0.85),
        *_beside_mlserver(EMBEDDED),
        *_beside_mlserver(HIDDEN),
        Quantity(TEXT.name, "1/s", "least", 0.85),
        *_beside_mlserver(TEXT),
    ],
    measure=measure,
    baseline=RAW,
    contestants=_with_stock,
)
