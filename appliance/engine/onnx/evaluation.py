"""What becomes of a batch: join → run → split, and item by item what failed in company.

It knows nothing of queues and turns of jobs, so that any thread may do it: it reads jobs, and only their owner writes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from appliance.core.errors import ApplianceError, EngineError
from appliance.core.types import Priority
from appliance.engine.cpu_budget import CpuShare
from appliance.engine.onnx.session import OnnxSession
from appliance.engine.onnx.work import Collation, Item

LOGGER = logging.getLogger("appliance.engine")
NEVER = math.inf
"""The deadline of a job that has none."""


@dataclass(eq=False, slots=True)
class Job:
    """One request.

    Attributes:
        arrived: Monotonic time, as `deadline` and `started` are.
        results: One for each item; the worker's until the job has ended.
        left: Items that have no result yet; the worker's.
        gone: Set when nobody waits for the answer any more: by the loop, or by the worker that has ended the job.
        compute_s: Seconds of the batches that it was in, to join, run and split them.
    """

    items: Sequence[Item]
    collation: Collation
    priority: Priority
    arrived: float
    deadline: float
    answer: asyncio.Future[list[Any]]
    trial: bool = False
    results: list[Any] = field(default_factory=list)
    left: int = 0
    started: float | None = None
    gone: bool = False
    compute_s: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])


@dataclass(frozen=True, slots=True)
class Piece:
    """An item of a job, by its index there."""

    job: Job
    index: int

    @property
    def item(self) -> Item:
        """Return the item."""
        return self.job.items[self.index]


@dataclass(frozen=True, slots=True)
class Execution:
    """A batch that was evaluated, or one item alone that failed.

    Attributes:
        compute_s: Seconds to join, run and split it.
    """

    items: int
    rows: int
    compute_s: tuple[float, float, float]
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Pieces that were evaluated together, or one alone that failed.

    Attributes:
        results: Of each piece; of one that failed there is none.
        execution: None where the failure is the sender's fault, and not the model's.
    """

    pieces: Sequence[Piece]
    results: Sequence[Any] = ()
    execution: Execution | None = None
    error: ApplianceError | None = None


class Evaluator:
    """Evaluates batches of one session, in turns with everyone else who computes."""

    def __init__(self, name: str, session: OnnxSession, share: CpuShare) -> None:
        """Take a turn of `share` for each run of the session; the name is for the log."""
        self._name = name
        self._session = session
        self._share = share

    def evaluate(self, pieces: Sequence[Piece], beat: Callable[[], None]) -> list[Evaluated]:
        """Evaluate what somebody waits for; pieces that fail together are tried alone, so that only the bad ones fail.

        Args:
            pieces: Of one collation and one key.
            beat: Called before each trial.
        """
        present = [each for each in pieces if not each.job.gone]
        if not present:
            return []
        try:
            return [self._together(present)]
        except ApplianceError as error:
            if len(present) == 1:
                failed = Execution(1, present[0].item.rows, (0.0, 0.0, 0.0), failed=True)
                return [Evaluated(present, (), failed if isinstance(error, EngineError) else None, error)]
            LOGGER.warning("%s: a batch of %d failed, each is tried alone: %s", self._name, len(present), error)
        return self._alone(present, beat)

    def _alone(self, pieces: Sequence[Piece], beat: Callable[[], None]) -> list[Evaluated]:
        found: list[Evaluated] = []
        failed: set[Job] = set()
        for each in pieces:
            beat()
            outcomes = [] if each.job in failed else self.evaluate([each], beat)
            if any(outcome.error for outcome in outcomes):
                failed.add(each.job)
            found += outcomes
        return found

    def _together(self, pieces: Sequence[Piece]) -> Evaluated:
        """Join → run → split.

        Raises:
            InvalidRequestError, EngineError: It cannot be done with these items.
        """
        items, collation = [each.item for each in pieces], pieces[0].job.collation
        began = time.perf_counter()
        try:
            inputs = collation.collate(items)
            with self._share.turn():
                ran = time.perf_counter()
                outputs = self._session.run(inputs, collation.outputs(items))
                done = time.perf_counter()
            results = collation.split(outputs, items)
        except MemoryError as error:
            raise EngineError(
                "There is not enough memory for the batch.",
                advice="Send smaller tensors, or lower `max_batch_rows` or `max_batch_tokens`.",
                code="not_enough_memory",
            ) from error
        except (ValueError, TypeError, LookupError) as error:  # an output is not what the collation was promised
            LOGGER.exception("%s: a batch of %d cannot be joined or split", self._name, len(items))
            raise EngineError(
                "The model's outputs are not of the shape that this use of it needs.", code="bad_output"
            ) from error
        seconds = (ran - began, done - ran, time.perf_counter() - done)
        return Evaluated(pieces, results, Execution(len(items), sum(each.rows for each in items), seconds))
