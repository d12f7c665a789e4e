"""Which inputs are evaluated together: the policy of the embedding batches, as a pure state machine.

A *job* is one request: some inputs, each of so many tokens. A batch closes at a number of tokens or of inputs; there is
no padding, so the budget is the sum of the lengths. An input that is longer than the budget makes a batch by itself.

The jobs take turns, an input each, so that a request of thousands holds up none of one; and whoever got nothing into a
batch comes first in the next, so that nobody starves: a job has to wait for at most one batch of each other job.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    """One input: the job it belongs to, its place there, and its length in tokens."""

    job: int
    index: int
    tokens: int


class Batcher:
    """The inputs that wait."""

    def __init__(self, *, tokens: int, inputs: int) -> None:
        """Close batches at so many tokens or inputs."""
        self._tokens = tokens
        self._inputs = inputs
        self._jobs: dict[int, deque[Item]] = {}

    @property
    def idle(self) -> bool:
        """Return True when nothing waits."""
        return not self._jobs

    def submit(self, job: int, lengths: Sequence[int]) -> None:
        """Queue a job's inputs by their lengths; it must have one or more, and no job twice at a time."""
        assert lengths, "a job has inputs"
        assert job not in self._jobs, "a job is queued once"
        self._jobs[job] = deque(Item(job, index, tokens) for index, tokens in enumerate(lengths))

    def cancel(self, job: int) -> None:
        """Forget what waits of a job. Idempotent."""
        self._jobs.pop(job, None)

    def next_batch(self) -> list[Item]:
        """Take the next inputs to evaluate together; empty only when nothing waits."""
        batch: list[Item] = []
        room = self._tokens
        served: dict[int, deque[Item]] = {}
        turns = list(self._jobs)
        while turns:
            still: list[int] = []
            for job in turns:
                waiting = self._jobs[job]
                if len(batch) < self._inputs and (not batch or waiting[0].tokens <= room):
                    batch.append(waiting.popleft())
                    room -= batch[-1].tokens
                    served[job] = waiting
                    if waiting:
                        still.append(job)
            turns = still
        for job, waiting in served.items():
            del self._jobs[job]
            if waiting:
                self._jobs[job] = waiting
        return batch
