"""The workloads of retrieval by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from appliance.bench.report import Progress
from tests.benchmarks.peers import cache_folder
from tests.benchmarks.results import Result
from tests.benchmarks.searching import ingest, searches
from tests.benchmarks.searching.peers import Peer
from tests.benchmarks.searching.workload import Effort, Trial, Workload
from tests.benchmarks.suite import take_turns

WORKLOADS: dict[str, Workload] = {
    each.name: each for each in (searches.SEARCHES, searches.MILLION, ingest.FILES, ingest.INGEST)
}


async def run(name: str, peers: Sequence[Peer], effort: Effort, data: Path, progress: Progress) -> Result:
    """Take all contestants through a workload, turn about.

    Raises:
        ApplianceError: One failed.
    """
    return await take_turns(
        WORKLOADS[name],
        peers,
        lambda peer, number: Trial(peer, effort, number, data, cache_folder() / "corpora"),
        effort.runs,
        progress,
    )
