"""How much is done, and what a contestant's turn is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tests.benchmarks import texts, workload
from tests.benchmarks.tensor.models import Tokens
from tests.benchmarks.tensor.peers import Peer

SENTENCE_TOKENS = 32
"""What sentences are padded to by clients that send tokens; none is longer."""
PASSAGE_TOKENS = (8, 250)
"""The lengths of passages, drawn evenly."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much each contestant is made to do.

    Attributes:
        runs: Repetitions, of which the median counts.
        clients: At once, each with one request after another.
        warm_s: Time before anything counts.
        steady_s: Time that counts.
        raw_s: The least time for each of raw onnxruntime's batch sizes.
        sentences: Distinct ones; there are so many requests that they come again.
        payloads: Requests with large tensors, one after another.
        binary_mb: Megabytes (2**20 bytes) of a binary tensor.
        json_elements: Of a tensor as JSON.
        singles: Requests with one row, one after another.
        streamed: Tokens of the chat beside embedding clients.
    """

    runs: int = 3
    clients: int = 32
    warm_s: float = 2.0
    steady_s: float = 10.0
    raw_s: float = 4.0
    sentences: int = 512
    passages: int = 512
    payloads: int = 30
    binary_mb: int = 16
    json_elements: int = 262_144
    singles: int = 2000
    streamed: int = 250


QUICK = Effort(
    runs=1,
    clients=8,
    warm_s=0.3,
    steady_s=1.0,
    raw_s=0.2,
    sentences=32,
    passages=32,
    payloads=2,
    binary_mb=16,
    json_elements=10_000,
    singles=50,
    streamed=30,
)
"""Whether it works at all; the figures mean nothing."""


@dataclass(frozen=True)
class Corpus:
    """The texts of one run, the same for all contestants, and others in the next."""

    run: int
    effort: Effort
    tokens: Tokens

    @cached_property
    def sentences(self) -> list[str]:
        """Return distinct sentences of at most `SENTENCE_TOKENS` tokens."""
        found: list[str] = []
        for sentence in texts.prose(f"{self.run}/sentences"):
            if self.tokens.count(sentence) <= SENTENCE_TOKENS:
                found.append(sentence)
            if len(found) == self.effort.sentences:
                break
        return found

    @cached_property
    def passages(self) -> list[str]:
        """Return passages of mixed lengths in no order."""
        least, greatest = PASSAGE_TOKENS
        return [
            texts.text(
                f"{self.run}/passage {number}", least + (number * 97) % (greatest - least + 1), self.tokens.count
            )
            for number in range(self.effort.passages)
        ]


@dataclass(frozen=True, slots=True)
class Trial:
    """One contestant's turn in one run."""

    peer: Peer
    corpus: Corpus

    @property
    def effort(self) -> Effort:
        """Return how much is to be done."""
        return self.corpus.effort


Workload = workload.WorkloadOf[Peer, Trial]
