"""The thread of one session: it owns the session and is the only one to touch the batcher.

It takes commands from one queue, and answers with one call to the event loop a batch. Its heartbeat is a number that it
raises whenever it goes round; nobody ever waits for it.

The next batch is not prepared beside the running one. To join and split a batch takes well under a hundredth of the
time to run it (the statistics tell: compute_input and compute_output against compute_infer), and a second thread would
have to share the interpreter with this one and the loop to save that.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from appliance.core.errors import ApplianceError, DeadlineExceededError, EngineError
from appliance.core.types import Priority
from appliance.engine.cpu_budget import CpuBudget, CpuShare
from appliance.engine.onnx.batcher import Batcher, Place
from appliance.engine.onnx.config import SessionConfig
from appliance.engine.onnx.session import OnnxSession
from appliance.engine.onnx.work import Collation, Item

LOGGER = logging.getLogger("appliance.engine")
IDLE_BEAT_S = 1.0
"""How often an idle worker goes round, for its heartbeat."""
CPU_BATCH_TOKENS = 512
"""Padded tokens beyond which a batch gains nothing on a CPU, where caches and not launches are scarce.

MiniLM (int8, one core) evaluates in a second 5,400 tokens as 32 rows of 12 and 4,200 as one row; of 64 5,100 as 4
rows, 5,000 as 16, 4,500 as 64; of 256 tokens 4,000 as one row, and 3,200 as 16, which take 400 MB more.
"""


@dataclass(eq=False, slots=True)
class Job:
    """One request.

    Attributes:
        arrived: Monotonic time, as `deadline` and `started` are.
        results: One for each item; the worker's until the job has ended.
        left: Items that have no result yet; the worker's.
        gone: Set by the loop when nobody waits for the answer any more.
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
class Submit:
    """Start a job."""

    job: Job


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget a job, wherever it is."""

    job: Job


Command = Submit | Cancel


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
class Report:
    """What a batch brought: jobs that have ended, each with its error or None, and what was evaluated, in order."""

    ended: Sequence[tuple[Job, ApplianceError | None]]
    executions: Sequence[Execution] = ()


class Worker:
    """Runs one session in its own thread until `stop`.

    Attributes:
        session: Set before `on_ready` is called; only what describes it may be read elsewhere.
        beat_at: Monotonic time of the last heartbeat.
        running: How many jobs are in the batch that runs.
    """

    session: OnnxSession

    def __init__(
        self,
        name: str,
        open_session: Callable[[], OnnxSession],
        config: SessionConfig,
        cpu: CpuBudget | None,
        *,
        on_ready: Callable[[OnnxSession], None],
        on_report: Callable[[Report], None],
        on_end: Callable[[ApplianceError | None], None],
    ) -> None:
        """Prepare a thread; the session is opened in it, and the callbacks are called in it."""
        self._name = name
        self._open_session = open_session
        self._config = config
        self._cpu = cpu
        self._on_ready, self._on_report, self._on_end = on_ready, on_report, on_end
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._numbers: dict[Job, int] = {}
        self._last_number = 0
        self._ended: list[tuple[Job, ApplianceError | None]] = []
        self._executions: list[Execution] = []
        self.beat_at = time.monotonic()
        self.running = 0
        self._thread = threading.Thread(target=self._run, name=f"onnx {name[:16]}", daemon=True)

    def start(self) -> None:
        """Start loading; `on_ready` or `on_end` follows."""
        self._thread.start()

    def put(self, command: Command) -> None:
        """Hand over a command; it takes effect before the next batch."""
        self._inbox.put(command)

    def stop(self) -> None:
        """End after the current batch; open jobs end with an error."""
        self._inbox.put(None)

    # The thread

    def _run(self) -> None:
        error: ApplianceError | None = None
        session: OnnxSession | None = None
        try:
            self.session = session = self._open_session()
            most_tokens = self._config.batch_tokens
            if session.on_cpu:
                most_tokens = min(most_tokens, CPU_BATCH_TOKENS)
            self._batcher = Batcher(rows=self._config.batch_rows, tokens=most_tokens)
            self._share = CpuShare(self._cpu if session.on_cpu else None, self._config.threads)
            with self._share.turn():
                session.warm_up()
            self._on_ready(session)
            while self._take_commands():
                self._step()
        except ApplianceError as failure:
            error = failure
        except Exception as failure:  # whatever killed the thread: the process must hear of it
            LOGGER.exception("the session's thread of %s died", self._name)
            error = EngineError(f"The session's thread died: {failure}.", code="engine_died")
        finally:
            self._end_everyone(error)
            if session is not None:
                session.close()
            self._on_end(error)

    def _take_commands(self) -> bool:
        """Carry out what waits; when idle, wait for it. Returns False when the worker is to stop."""
        while True:
            self._beat()
            idle = self._batcher.idle
            try:
                command = self._inbox.get(timeout=IDLE_BEAT_S) if idle else self._inbox.get_nowait()
            except queue.Empty:
                if idle:
                    continue
                return True
            if command is None:
                return False
            self._carry_out(command)

    def _beat(self) -> None:
        self.beat_at = time.monotonic()

    def _carry_out(self, command: Command) -> None:
        match command:
            case Submit(job):
                self._last_number = number = self._last_number + 1
                self._jobs[number], self._numbers[job] = job, number
                job.results, job.left = [None] * len(job.items), len(job.items)
                self._batcher.submit(
                    number,
                    job.items,
                    kind=id(job.collation),
                    priority=job.priority,
                    now=job.arrived,
                    deadline=job.deadline,
                )
            case Cancel(job):
                if job in self._numbers:
                    self._forget(self._numbers[job])

    def _step(self) -> None:
        """Choose → evaluate → deliver."""
        now = time.monotonic()
        for number in self._batcher.expire(now):
            self._end(number, DeadlineExceededError("The request's time ran out while it waited."))
        batch = self._batcher.next_batch(now)
        jobs = {place.job for place in batch}
        for number in jobs:
            job = self._jobs[number]
            if job.started is None:
                job.started = now
        self.running = len(jobs)
        self._evaluate(batch)
        self.running = 0
        ended, self._ended = self._ended, []
        executions, self._executions = self._executions, []
        self._on_report(Report(ended, executions))

    def _evaluate(self, places: Sequence[Place]) -> None:
        """Evaluate items together; those that fail in company are tried alone, so that only the bad ones fail."""
        present = [each for each in places if self._is_wanted(each)]
        if not present:
            return
        items = [self._jobs[each.job].items[each.index] for each in present]
        try:
            results, execution = self._compute(items, self._jobs[present[0].job].collation)
        except ApplianceError as error:
            if len(present) > 1:
                LOGGER.warning("%s: a batch of %d failed, each is tried alone: %s", self._name, len(present), error)
                for each in present:
                    self._beat()
                    self._evaluate([each])
                return
            if isinstance(error, EngineError):  # bad tensors are their sender's fault, not the model's
                self._executions.append(Execution(1, items[0].rows, (0.0, 0.0, 0.0), failed=True))
            self._end(present[0].job, error)
            return
        self._executions.append(execution)
        for number in {each.job for each in present}:
            job = self._jobs[number]
            job.compute_s = [sum(each) for each in zip(job.compute_s, execution.compute_s, strict=True)]
        for each, result in zip(present, results, strict=True):
            self._take(each, result)

    def _is_wanted(self, place: Place) -> bool:
        job = self._jobs.get(place.job)
        return job is not None and not job.gone

    def _compute(self, items: Sequence[Item], collation: Collation) -> tuple[Sequence[Any], Execution]:
        """Join → run → split.

        Raises:
            InvalidRequestError, EngineError: It cannot be done with these items.
        """
        began = time.perf_counter()
        try:
            inputs = collation.collate(items)
            with self._share.turn():
                ran = time.perf_counter()
                outputs = self.session.run(inputs)
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
        return results, Execution(len(items), sum(each.rows for each in items), seconds)

    def _take(self, place: Place, result: Any) -> None:
        job = self._jobs[place.job]
        job.results[place.index] = result
        job.left -= 1
        if not job.left:
            self._end(place.job, None)

    def _end(self, number: int, error: ApplianceError | None) -> None:
        self._ended.append((self._jobs[number], error))
        self._forget(number)

    def _forget(self, number: int) -> None:
        del self._numbers[self._jobs.pop(number)]
        self._batcher.cancel(number)

    def _end_everyone(self, error: ApplianceError | None) -> None:
        reason = error or EngineError(
            "The model was unloaded.", advice="Send the request again.", code="model_unloaded"
        )
        ended = [*self._ended, *((job, reason) for job in self._jobs.values())]
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, Submit):
                ended.append((command.job, reason))
        self._jobs.clear()
        self._numbers.clear()
        self._on_report(Report(ended))


NEVER = math.inf
"""The deadline of a job that has none."""
