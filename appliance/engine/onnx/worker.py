"""The threads of one session: a worker that owns the queue and the batcher, and the lanes that evaluate for it.

The worker takes commands from one queue, and answers with one call to the event loop a batch. With one lane it
evaluates itself. With several, each is a thread that is handed one batch after another and puts what became of it into
the same queue; so whatever is written down of jobs is written by the worker, and nothing needs a lock. Heartbeats are
numbers; nobody ever waits for them.

Several lanes pay on a CPU: two evaluations with a thread each take a tenth less CPU time than one with two threads, and
leave no core idle (MiniLM, batches of 4 to 16 sentences). They do not for large inputs that come alone, such as images:
a lane evaluates an input with its own threads only.

The next batch is not prepared beside the running one. To join and split batches of an encoder takes half a hundredth of
the time to run them (the statistics tell: compute_input and compute_output against compute_infer). Of a model that runs
for microseconds it takes longer than that, but there all is the interpreter's work, which a second thread only shares.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from appliance.core.errors import ApplianceError, DeadlineExceededError, EngineError
from appliance.engine.cpu_budget import CpuBudget, CpuShare
from appliance.engine.onnx.batcher import Batcher
from appliance.engine.onnx.config import SessionConfig
from appliance.engine.onnx.evaluation import Evaluated, Evaluator, Execution, Job, Piece
from appliance.engine.onnx.session import OnnxSession

LOGGER = logging.getLogger("appliance.engine")
IDLE_BEAT_S = 1.0
"""How often an idle worker goes round, for its heartbeat."""
CPU_BATCH_TOKENS = 256
"""Padded tokens beyond which a batch gains nothing on a CPU, where caches and not launches are scarce.

With two lanes 8 rows of 32 are 2 % faster than 16 (279 to 275 rows a second, medians of three served over `/v2`).

MiniLM (int8, one core) evaluates in a second 5,400 tokens as 32 rows of 12 and 4,200 as one row; of 64 5,100 as 4
rows, 5,000 as 16, 4,500 as 64; of 256 tokens 4,000 as one row, and 3,200 as 16, which take 400 MB more.
"""


@dataclass(frozen=True, slots=True)
class Submit:
    """Start a job."""

    job: Job


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget a job, wherever it is."""

    job: Job


@dataclass(frozen=True, slots=True)
class Done:
    """Take back a lane, and what became of its batch, or what killed it."""

    lane: Lane
    evaluated: Sequence[Evaluated] = ()
    failure: Exception | None = None


Command = Submit | Cancel | Done


@dataclass(frozen=True, slots=True)
class Report:
    """What a batch brought: jobs that have ended, each with its error or None, and what was evaluated, in order."""

    ended: Sequence[tuple[Job, ApplianceError | None]]
    executions: Sequence[Execution] = ()


class Lane:
    """A thread that evaluates for a worker.

    Attributes:
        beat_at: Monotonic time of the last heartbeat; infinite while it has nothing to do.
        jobs: Whose items it evaluates; the worker's.
    """

    def __init__(self, name: str, evaluator: Evaluator, on_done: Callable[[Done], None]) -> None:
        """Start the thread, in which `on_done` is called once for each batch."""
        self._evaluator = evaluator
        self._on_done = on_done
        self._batches: queue.SimpleQueue[Sequence[Piece] | None] = queue.SimpleQueue()
        self.beat_at = math.inf
        self.jobs: set[Job] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, pieces: Sequence[Piece]) -> None:
        """Hand over a batch."""
        self.jobs = {each.job for each in pieces}
        self._beat()
        self._batches.put(pieces)

    def rest(self) -> None:
        """Take note that its batch is done."""
        self.jobs = set()
        self.beat_at = math.inf

    def stop(self) -> None:
        """End after the current batch."""
        self._batches.put(None)

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()

    def _beat(self) -> None:
        self.beat_at = time.monotonic()

    def _run(self) -> None:
        while self._evaluate(self._batches.get()):  # keeps nothing of a batch while it waits for the next
            pass

    def _evaluate(self, pieces: Sequence[Piece] | None) -> bool:
        if pieces is None:
            return False
        try:
            done = Done(self, self._evaluator.evaluate(pieces, self._beat))
        except Exception as failure:  # noqa: BLE001 - the worker raises it: what kills a lane kills the session
            done = Done(self, failure=failure)
        self._on_done(done)
        return True


class Worker:
    """Runs one session in threads of its own until `stop`.

    Attributes:
        session: Set before `on_ready` is called; only what describes it may be read elsewhere.
        running: How many jobs are in the batches that run.
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
        self._lanes: list[Lane] = []
        self._free: list[Lane] = []
        self._ended: list[tuple[Job, ApplianceError | None]] = []
        self._executions: list[Execution] = []
        self._beat_at = time.monotonic()
        self.running = 0
        self._thread_name = f"onnx {name[:16]}"
        self._thread = threading.Thread(target=self._run, name=self._thread_name, daemon=True)

    def start(self) -> None:
        """Start loading; `on_ready` or `on_end` follows."""
        self._thread.start()

    def put(self, command: Command) -> None:
        """Hand over a command; it takes effect before the next batch."""
        self._inbox.put(command)

    def stop(self) -> None:
        """End after the current batches; open jobs end with an error."""
        self._inbox.put(None)

    @property
    def beat_at(self) -> float:
        """Return the monotonic time of the last heartbeat of whichever thread has not beaten for the longest time."""
        return min([self._beat_at, *(each.beat_at for each in self._lanes)])

    # The thread

    def _run(self) -> None:
        error: ApplianceError | None = None
        session: OnnxSession | None = None
        try:
            self.session = session = self._open_session()
            self._prepare(session)
            self._on_ready(session)
            while self._take_commands():
                self._step()
        except ApplianceError as failure:
            error = failure
        except Exception as failure:  # whatever killed the thread: the process must hear of it
            LOGGER.exception("the session's thread of %s died", self._name)
            error = EngineError(f"The session's thread died: {failure}.", code="engine_died")
        finally:
            self._end_lanes()
            self._end_everyone(error)
            if session is not None:
                session.close()
            self._on_end(error)

    def _prepare(self, session: OnnxSession) -> None:
        config, most_tokens = self._config, self._config.batch_tokens
        lanes, threads = 1, config.threads
        if session.on_cpu:
            most_tokens = min(most_tokens, CPU_BATCH_TOKENS)
            lanes, threads = config.lanes, config.lane_threads
        self._batcher = Batcher(rows=config.batch_rows, tokens=most_tokens)
        self._share = CpuShare(self._cpu if session.on_cpu else None, threads)
        with self._share.turn():
            session.warm_up()
        self._evaluator = Evaluator(self._name, session, self._share)
        if lanes > 1:
            self._lanes = [Lane(self._thread_name, self._evaluator, self._inbox.put) for _ in range(lanes)]
            self._free = list(self._lanes)

    def _take_commands(self) -> bool:
        """Carry out what waits; while there is nothing to begin, wait. Returns False when the worker is to stop."""
        while True:
            self._beat()
            waits = self._batcher.idle or self._is_full
            try:
                command = self._inbox.get(timeout=IDLE_BEAT_S) if waits else self._inbox.get_nowait()
            except queue.Empty:
                if not waits:
                    return True
                if len(self._free) == len(self._lanes):
                    self._rest()
                continue
            if command is None:
                return False
            self._carry_out(command)
            del command  # or it would keep a batch until the next comes

    @property
    def _is_full(self) -> bool:
        return bool(self._lanes) and not self._free

    def _rest(self) -> None:
        """Give memory back, once nobody has asked for anything for a while."""
        if not self.session.can_shrink:
            return
        try:
            with self._share.turn():
                self.session.shrink()
        except EngineError as error:
            LOGGER.warning("%s keeps its memory: %s", self._name, error)

    def _beat(self) -> None:
        self._beat_at = time.monotonic()

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
                self._forget(job)
            case Done(lane, evaluated, failure):
                lane.rest()
                self._free.append(lane)
                self._note_running()
                if failure is not None:
                    raise failure
                self._take(evaluated)

    def _step(self) -> None:
        """Choose → evaluate → deliver, or have the lanes evaluate that are free."""
        now = time.monotonic()
        for number in self._batcher.expire(now):
            self._end(self._jobs[number], DeadlineExceededError("The request's time ran out while it waited."))
        if self._lanes:
            share = math.ceil(self._batcher.rows / len(self._lanes))
            while self._free and not self._batcher.idle:
                self._free.pop().put(self._next_batch(now, share))
                self._note_running()
            self._take(())
            return
        pieces = self._next_batch(now)
        self.running = len({each.job for each in pieces})
        evaluated = self._evaluator.evaluate(pieces, self._beat)
        self.running = 0
        self._take(evaluated)

    def _next_batch(self, now: float, most_rows: float = math.inf) -> list[Piece]:
        places = self._batcher.next_batch(now, most_rows)
        batch = [Piece(self._jobs[each.job], each.index) for each in places]
        for each in batch:
            if each.job.started is None:
                each.job.started = now
        return batch

    def _note_running(self) -> None:
        self.running = len(set[Job]().union(*(each.jobs for each in self._lanes)))

    def _take(self, evaluated: Sequence[Evaluated]) -> None:
        """Write down what became of batches, and tell the loop."""
        for each in evaluated:
            if each.execution is not None:
                self._executions.append(each.execution)
                self._add_seconds(each.execution, {piece.job for piece in each.pieces})
            if each.error is not None:
                self._end(each.pieces[0].job, each.error)
            for piece, result in zip(each.pieces, each.results, strict=False):  # of a failure there is none
                self._give(piece, result)
        if self._ended or self._executions:
            ended, self._ended = self._ended, []
            executions, self._executions = self._executions, []
            self._on_report(Report(ended, executions))

    def _add_seconds(self, execution: Execution, jobs: set[Job]) -> None:
        for job in jobs:
            job.compute_s = [sum(each) for each in zip(job.compute_s, execution.compute_s, strict=True)]

    def _give(self, piece: Piece, result: object) -> None:
        job = piece.job
        if job not in self._numbers:  # it ended while the batch ran
            return
        job.results[piece.index] = result
        job.left -= 1
        if not job.left:
            self._end(job, None)

    def _end(self, job: Job, error: ApplianceError | None) -> None:
        if job in self._numbers:
            self._ended.append((job, error))
            self._forget(job)

    def _forget(self, job: Job) -> None:
        number = self._numbers.pop(job, None)
        if number is not None:
            job.gone = True
            del self._jobs[number]
            self._batcher.cancel(number)

    def _end_lanes(self) -> None:
        for each in self._lanes:
            each.stop()
        for each in self._lanes:
            each.join()

    def _end_everyone(self, error: ApplianceError | None) -> None:
        reason = error or EngineError(
            "The model was unloaded.", advice="Send the request again.", code="model_unloaded"
        )
        late = []
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, Submit):
                late.append((command.job, reason))
            elif isinstance(command, Done):
                self._take(command.evaluated)
        ended = [*self._ended, *((job, reason) for job in self._jobs.values()), *late]
        self._jobs.clear()
        self._numbers.clear()
        self._on_report(Report(ended))
