"""An ONNX model as the event loop sees it: hand in items or tensors, await results, know how it is doing.

Everything here runs on the loop. The thread is reached by its queue of commands, and reaches back by one
`call_soon_threadsafe` a batch.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

from numpy.typing import NDArray

from appliance.core.errors import (
    ApplianceError,
    DeadlineExceededError,
    EngineError,
    OverloadedError,
    UnavailableError,
)
from appliance.core.tensors import BatchStatistics, ModelSignature, TensorStatistics
from appliance.core.types import Priority
from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.onnx.circuit import Circuit
from appliance.engine.onnx.config import SessionConfig
from appliance.engine.onnx.evaluation import NEVER, Execution, Job
from appliance.engine.onnx.providers import TENSORRT
from appliance.engine.onnx.session import OnnxSession
from appliance.engine.onnx.tensor_collation import TensorCollation
from appliance.engine.onnx.work import Collation, Item
from appliance.engine.onnx.worker import Cancel, Report, Submit, Worker
from appliance.observe.metrics import TensorMetrics

LOGGER = logging.getLogger("appliance.engine")
WEIGHT = 0.2
"""Share of the newest batch in the seconds an item takes."""
STOP_TIMEOUT_S = 30.0
LONGEST_RETRY_AFTER_S = 60.0
MOST_BATCH_SIZES = 256
"""Sizes of batches that have statistics of their own; clients choose the sizes."""

T = TypeVar("T")


class OnnxEngine:
    """One loaded ONNX model.

    Attributes:
        name: The full `name:version`, for answers and metrics.
        ended: Done when the thread has ended; its result is the error that ended it, or None after `close`.
        statistics: What it has done since it was loaded.
    """

    def __init__(self, name: str, path: Path, config: SessionConfig, metrics: TensorMetrics, cpu: CpuBudget) -> None:
        """Prepare an engine; `load` makes one that runs."""
        self.name = name
        self.config = config
        self._metrics = metrics
        self._loop = loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[ApplianceError | None] = loop.create_future()
        self._ready: asyncio.Future[OnnxSession] = loop.create_future()
        self._open: set[Job] = set()
        self._item_s = 0.01
        self._circuit = Circuit(failures=config.circuit_failures, open_s=config.circuit_open_s)
        stem, _, version = name.rpartition(":")
        self.statistics = TensorStatistics(stem or version, version if stem else "")
        self._worker = Worker(
            name,
            lambda: OnnxSession(path, config),
            config,
            cpu,
            on_ready=lambda session: _post(loop, self._ready.set_result, session),
            on_report=lambda report: _post(loop, self._take_report, report),
            on_end=lambda error: _post(loop, self._take_end, error),
        )

    _tensors: TensorCollation

    @classmethod
    async def load(
        cls, name: str, path: Path, config: SessionConfig, metrics: TensorMetrics, cpu: CpuBudget
    ) -> OnnxEngine:
        """Open the file in a new thread, warm it up, and return the engine that then runs.

        Args:
            name: The full `name:version`.
            path: The graph; files that it refers to lie beside it.
            config: How to run it.
            metrics: Where to count.
            cpu: Whom to ask before computing on the CPU.

        Raises:
            ModelFileError: onnxruntime refuses the file, or it is no model of tensors.
            SettingsError: The execution providers that are wished cannot be had.
            EngineError: There is not enough memory, or a provider could not be started.
        """
        engine = cls(name, path, config, metrics, cpu)
        engine._worker.start()
        try:
            outcomes: list[asyncio.Future[Any]] = [engine._ready, engine.ended]
            await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await engine.close()  # native code that loads must not outlive the interpreter
            raise
        if not engine._ready.done():
            raise engine.ended.result() or EngineError("The engine ended while loading.", code="engine_died")
        engine._tensors = TensorCollation(engine.signature)
        LOGGER.info("%s runs on %s", name, ", ".join(engine.providers))
        return engine

    # What the model is

    @property
    def signature(self) -> ModelSignature:
        """Return what the model takes and gives."""
        return self._ready.result().signature

    @property
    def providers(self) -> tuple[str, ...]:
        """Return the execution providers that onnxruntime really uses, first choice first, in its own names."""
        return self._ready.result().providers

    @property
    def properties(self) -> Mapping[str, str]:
        """Return what the model runs with."""
        properties = {"execution_providers": ",".join(self.providers), "threads": str(self.config.threads)}
        if self._ready.result().on_cpu:
            properties["lanes"] = str(self.config.lanes)
        if TENSORRT in self.providers:
            properties["precision"] = self.config.precision
        return MappingProxyType(properties)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return what the file's publisher wrote into it."""
        return MappingProxyType(self._ready.result().metadata)

    # Work

    @property
    def open_requests(self) -> int:
        """Return how many requests have not ended."""
        return len(self._open)

    @property
    def queue_full(self) -> bool:
        """Return True if one more request would be refused."""
        return len(self._open) - max(1, self._worker.running) >= self.config.queue_size

    @property
    def circuit_open(self) -> bool:
        """Return True while requests are refused because the model failed too often of late."""
        return self._circuit.refuses(time.monotonic())

    async def infer(
        self,
        inputs: Mapping[str, NDArray[Any]],
        outputs: tuple[str, ...] = (),
        *,
        priority: Priority = Priority.DEFAULT,
        deadline_s: float | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Return the outputs that are wanted, in that order, or all in the signature's.

        Args:
            inputs: Every input of the model by name, as in `core.tensors.Tensor`.
            outputs: Names; none is all.
            priority: Who comes first.
            deadline_s: Seconds from now after which the work is given up.

        Raises:
            InvalidRequestError: A tensor is missing, unknown, or of the wrong datatype or shape; `param` names it.
            ApplianceError: As `submit`.
        """
        self._ready.result().inputs.check(inputs, outputs)
        item = self._tensors.item(inputs, outputs)
        results = await self.submit([item], self._tensors, priority=priority, deadline_s=deadline_s)
        return cast("dict[str, NDArray[Any]]", results[0])

    async def submit(
        self,
        items: Sequence[Item],
        collation: Collation,
        *,
        priority: Priority = Priority.DEFAULT,
        deadline_s: float | None = None,
    ) -> list[Any]:
        """Return each item's result. Leaving cancels what has not run, and nobody else notices.

        Args:
            items: In any number; of none nothing is evaluated.
            collation: How they become arrays; the same object for all that may share batches.
            priority: Who comes first.
            deadline_s: Seconds from now after which the work is given up.

        Raises:
            OverloadedError: The queue is full.
            UnavailableError: The model failed too often of late (`circuit_open`).
            DeadlineExceededError: It took longer than `deadline_s`.
            InvalidRequestError: An item's values cannot be given to the model.
            EngineError: The model failed on an item, or the thread has ended.
        """
        if not items:
            return []
        now = time.monotonic()
        trial = self._admit(now)
        answer: asyncio.Future[list[Any]] = self._loop.create_future()
        deadline = NEVER if deadline_s is None else now + deadline_s
        job = Job(items, collation, priority, now, deadline, answer, trial)
        timer = None if deadline_s is None else self._loop.call_later(deadline_s, self._expire, job, deadline_s)
        self._open.add(job)
        self._worker.put(Submit(job))
        self._show_load()
        try:
            return await answer
        finally:
            if timer is not None:
                timer.cancel()
            if job in self._open:  # the caller left
                self._drop(job)
                self.statistics.cancel.add(time.monotonic() - now)

    def count_prompt_tokens(self, n: int) -> None:
        """Count tokens that an encoder has had evaluated."""
        self._metrics.prompt_tokens(n)

    def _admit(self, now: float) -> bool:
        """Return whether the next request is the trial of a circuit that was open.

        Raises:
            EngineError, OverloadedError, UnavailableError: There can be none.
        """
        if self.ended.done():
            raise EngineError(f"The engine of {self.name} has ended.", code="engine_died")
        if self.queue_full:
            raise OverloadedError(
                f"{len(self._open)} requests for {self.name} are open; {self.config.queue_size} may wait.",
                advice="Try again later, or raise `queue_size`.",
                retry_after_s=self._retry_after(),
            )
        if not self._circuit.admit(now):
            raise UnavailableError(
                f"{self.name} failed {self.config.circuit_failures} times in a row and is not asked for a while.",
                advice="Check the tensors' values; see the log for the model's own words.",
                code="circuit_open",
                retry_after_s=max(1.0, math.ceil(self._circuit.retry_after(now))),
            )
        return self._circuit.on_trial

    # State

    @property
    def heartbeat_age_s(self) -> float:
        """Return the seconds since the thread last went round; infinite once it has ended."""
        return math.inf if self.ended.done() else time.monotonic() - self._worker.beat_at

    async def close(self) -> None:
        """End the thread and give the model up; open requests end with an error. Idempotent.

        Raises:
            EngineError: The thread did not end in time; its memory is lost until the process ends.
        """
        self._worker.stop()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await asyncio.shield(self.ended)
        except TimeoutError as error:
            raise EngineError(f"The engine of {self.name} did not stop within {STOP_TIMEOUT_S:g} s.") from error

    def _retry_after(self) -> float:
        """Estimate the seconds until all that is accepted is through."""
        seconds = self._item_s * sum(len(job.items) for job in self._open)
        return float(math.ceil(min(LONGEST_RETRY_AFTER_S, max(1.0, seconds))))

    def _drop(self, job: Job) -> None:
        """Let the thread know that nobody waits for the job."""
        job.gone = True
        self._worker.put(Cancel(job))
        self._forget(job)

    def _forget(self, job: Job) -> None:
        self._open.discard(job)
        if job.trial:
            self._circuit.abandon()
        self._show_load()

    def _show_load(self) -> None:
        running = min(len(self._open), max(1, self._worker.running))  # a batch that begins now is not told of
        self._metrics.set_running(running)
        self._metrics.set_waiting(len(self._open) - running)

    def _expire(self, job: Job, deadline_s: float) -> None:
        if job not in self._open:
            return
        self._drop(job)
        self._fail(job, DeadlineExceededError(f"The request took longer than its {deadline_s:g} s."))

    def _fail(self, job: Job, error: ApplianceError) -> None:
        self.statistics.fail.add(time.monotonic() - job.arrived)
        if not job.answer.done():
            job.answer.set_exception(error)

    # Called by the worker's thread through the loop

    def _take_report(self, report: Report) -> None:
        for execution in report.executions:
            self._count(execution)
        for job, error in report.ended:
            if job in self._open:
                self._deliver(job, error)
        self._show_load()

    def _count(self, execution: Execution) -> None:
        if execution.failed:
            self._circuit.failed(time.monotonic())
            return
        self._circuit.succeeded()
        rows, statistics = execution.rows, self.statistics
        self._item_s += WEIGHT * (sum(execution.compute_s) / execution.items - self._item_s)
        self._metrics.batch(rows)
        statistics.last_inference = time.time()
        statistics.inference_count += rows
        statistics.execution_count += 1
        batch = statistics.batches.get(rows)
        if batch is None:
            if len(statistics.batches) >= MOST_BATCH_SIZES:
                return
            batch = statistics.batches[rows] = BatchStatistics(rows)
        for duration, seconds in zip(
            (batch.compute_input, batch.compute_infer, batch.compute_output), execution.compute_s, strict=True
        ):
            duration.add(seconds)

    def _deliver(self, job: Job, error: ApplianceError | None) -> None:
        self._forget(job)
        if error is not None:
            self._fail(job, error)
            return
        now, started = time.monotonic(), job.arrived if job.started is None else job.started
        statistics = self.statistics
        statistics.success.add(now - job.arrived)
        statistics.queue.add(started - job.arrived)
        statistics.compute_input.add(job.compute_s[0])
        statistics.compute_infer.add(job.compute_s[1])
        statistics.compute_output.add(job.compute_s[2])
        self._metrics.request_finished(started - job.arrived, now - job.arrived)
        if not job.answer.done():  # else the caller leaves just now
            job.answer.set_result(job.results)

    def _take_end(self, error: ApplianceError | None) -> None:
        reason = error or EngineError(f"{self.name} was unloaded.", advice="Try again.", code="model_unloaded")
        for job in list(self._open):
            self._forget(job)
            self._fail(job, reason)
        self._show_load()
        self.ended.set_result(error)


def _post(loop: asyncio.AbstractEventLoop, call: Callable[[T], None], value: T) -> None:
    """Have the loop make the call; a loop that is closed has nobody left to tell."""
    try:
        loop.call_soon_threadsafe(call, value)
    except RuntimeError:
        LOGGER.debug("the event loop has ended before an engine")
