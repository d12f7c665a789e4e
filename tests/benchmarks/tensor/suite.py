"""The workloads of tensors by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from appliance.bench.report import Progress
from appliance.bench.suite import ungrouped
from tests.benchmarks.results import Result
from tests.benchmarks.suite import take_turns
from tests.benchmarks.tensor import mixed, passages, payloads, sentences, tabular
from tests.benchmarks.tensor.models import Tokens
from tests.benchmarks.tensor.peers import MLServer, Peer
from tests.benchmarks.tensor.workload import Corpus, Effort, Trial, Workload

TUNING_WARM_S, TUNING_STEADY_S = 1.0, 3.0

WORKLOADS: dict[str, Workload] = {
    each.name: each
    for each in (
        sentences.WORKLOAD,
        passages.WORKLOAD,
        payloads.BINARY,
        payloads.JSON_TENSORS,
        tabular.WORKLOAD,
        mixed.WORKLOAD,
    )
}


async def run(name: str, peers: Sequence[Peer], effort: Effort, tokens: Tokens, progress: Progress) -> Result:
    """Take all contestants through a workload, turn about.

    Raises:
        ApplianceError: One did not become ready, or its answers are not whole.
    """
    corpora = [Corpus(number, effort, tokens) for number in range(effort.runs)]
    return await take_turns(
        WORKLOADS[name], peers, lambda peer, number: Trial(peer, corpora[number]), effort.runs, progress
    )


async def tuned(peers: Sequence[Peer], effort: Effort, tokens: Tokens, progress: Progress) -> list[Peer]:
    """Return the peers, MLServer with the tuning by which it answers the most sentences here.

    Raises:
        ApplianceError: It did not become ready, or its answers are not whole.
    """
    corpus = Corpus(0, replace(effort, warm_s=TUNING_WARM_S, steady_s=TUNING_STEADY_S), tokens)
    return [await _tuned(each, corpus, progress) if isinstance(each, MLServer) else each for each in peers]


async def _tuned(peer: MLServer, corpus: Corpus, progress: Progress) -> MLServer:
    rates = {}
    for tuning in peer.candidates:
        candidate = replace(peer, tuning=tuning)
        with ungrouped():
            rates[candidate] = await sentences.throughput(candidate, corpus)
        progress(f"{peer.name} with {tuning}: {rates[candidate]:.0f} sentences/s")
    return max(rates, key=lambda candidate: rates[candidate])
