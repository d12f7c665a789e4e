"""How much is done, and what a contestant's turn is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import workload
from tests.benchmarks.searching.corpus import Corpus
from tests.benchmarks.searching.peers import Peer


@dataclass(frozen=True, slots=True)
class Effort:
    """How much each contestant is made to do.

    Attributes:
        runs: Repetitions, of which the median counts; an index is made once.
        many: Texts of the workload `searches`.
        most: Texts of the workload `million`.
        queries: One after another, each way to search.
        files: Small ones that are added to a store.
        passages: Files of a passage each that are added to a store, and as many that are embedded.
    """

    runs: int = 3
    many: int = 100_000
    most: int = 1_000_000
    queries: int = 200
    files: int = 10_000
    passages: int = 512


QUICK = Effort(runs=1, many=6000, most=60_000, queries=20, files=200, passages=64)
"""Whether it works at all; the figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One contestant's turn in one run.

    Attributes:
        data: A data folder that has the embedder; only read.
        corpora: Where corpora are kept from one call to the next.
    """

    peer: Peer
    effort: Effort
    run: int
    data: Path
    corpora: Path

    def corpus(self, count: int) -> Corpus:
        """Return so many texts; they are made if they are not there."""
        corpus = Corpus(self.corpora / f"{count}-{self.effort.queries}", count, self.effort.queries)
        corpus.make()
        return corpus


Workload = workload.WorkloadOf[Peer, Trial]
