"""The thread of one embedding context: it owns every native handle and is the only one to touch the batcher.

It takes commands from one queue, and answers with one call to the event loop a batch. Its heartbeat is a number that it
raises whenever it goes round; nobody ever waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from appliance.core.errors import ApplianceError, EngineError
from appliance.core.types import Vector
from appliance.engine.cpu_budget import CpuBudget, CpuShare
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama_embedding.batcher import Batcher, Item
from appliance.engine.llama_embedding.context import LlamaEmbeddingContext, Vectors

LOGGER = logging.getLogger("appliance.engine")
IDLE_BEAT_S = 1.0
"""How often an idle worker goes round, for its heartbeat."""
FAILURES_UNTIL_DEAD = 3
"""So many inputs in a row that fail alone, and the context counts as broken."""
MOST_INPUTS = 64
"""Inputs of one batch, each a native sequence."""
MOST_RECURRENT_INPUTS = 8
"""The same where each sequence has a state of megabytes."""


@dataclass(frozen=True, slots=True)
class EmbeddingConfig:
    """What an embedding context is run with, see the settings; `queue_size` may wait beside one that is worked on."""

    longest_input: int
    batch_tokens: int
    threads: int
    queue_size: int
    flash_attention: Literal["auto", "on", "off"] = "auto"


@dataclass(eq=False, slots=True)
class Job:
    """One request: inputs of one or more tokens that fit, and on the loop its answer.

    Attributes:
        vectors: One for each input, None until it is there; the worker's until the job has ended.
    """

    inputs: Sequence[array[int]]
    arrived: float
    answer: asyncio.Future[Sequence[Vector]]
    vectors: list[Vector | None] = field(default_factory=list)
    started: float | None = None

    @property
    def tokens(self) -> int:
        """Return the tokens of all inputs."""
        return sum(map(len, self.inputs))


@dataclass(frozen=True, slots=True)
class Embed:
    """Start a job."""

    job: Job


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget a job, wherever it is."""

    job: Job


Command = Embed | Cancel


@dataclass(frozen=True, slots=True)
class Report:
    """What a batch brought: jobs that have ended, each with its error or None, and what the batch cost."""

    ended: Sequence[tuple[Job, ApplianceError | None]]
    tokens: int
    seconds: float


class Worker:
    """Runs one embedding context in its own thread until `stop`.

    Attributes:
        model: Set before `on_ready` is called; its vocabulary may be used by any thread.
        context: The same; only its sizes may be read elsewhere.
        beat_at: Monotonic time of the last heartbeat.
    """

    def __init__(
        self,
        name: str,
        open_model: Callable[[], LlamaModel],
        config: EmbeddingConfig,
        *,
        on_ready: Callable[[None], None],
        on_report: Callable[[Report], None],
        on_end: Callable[[ApplianceError | None], None],
        cpu: CpuBudget | None = None,
    ) -> None:
        """Prepare a thread; the model is opened in it, and the callbacks are called in it."""
        self._cpu = CpuShare(cpu, config.threads)
        self._name = name
        self._open_model = open_model
        self._config = config
        self._on_ready, self._on_report, self._on_end = on_ready, on_report, on_end
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._ended: list[tuple[Job, ApplianceError | None]] = []
        self._numbers = 0
        self._failures = 0
        self.beat_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"embed {name[:16]}", daemon=True)

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
        model: LlamaModel | None = None
        context: LlamaEmbeddingContext | None = None
        try:
            self.model = model = self._open_model()
            self.context = context = self._new_context(model)
            self._batcher = Batcher(tokens=context.batch_tokens, inputs=_most_inputs(model))
            self._warm_up()
            self._on_ready(None)
            while self._take_commands():
                self._step()
        except ApplianceError as failure:
            error = failure
        except Exception as failure:  # whatever killed the thread: the process must hear of it
            LOGGER.exception("the embedding thread of %s died", self._name)
            error = EngineError(f"The embedding thread died: {failure}.", code="engine_died")
        finally:
            self._end_everyone(error)
            if context is not None:
                context.close()
            if model is not None:
                model.close()
            self._on_end(error)

    def _step(self) -> None:
        """Choose → evaluate → deliver."""
        batch = self._batcher.next_batch()
        began = time.monotonic()
        self._note_started(batch, began)
        vectors = self._evaluate(batch)
        for item, vector in zip(batch, vectors, strict=True):
            self._take(item, vector)
        ended, self._ended = self._ended, []
        tokens = sum(each.tokens for each in batch)
        self._on_report(Report(ended, tokens, time.monotonic() - began))

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
            case Embed(job):
                self._numbers += 1
                self._jobs[self._numbers] = job
                job.vectors = [None] * len(job.inputs)
                self._batcher.submit(self._numbers, [len(each) for each in job.inputs])
            case Cancel(job):
                for number in [number for number, each in self._jobs.items() if each is job]:
                    self._forget(number)

    def _note_started(self, batch: Sequence[Item], now: float) -> None:
        for item in batch:
            job = self._jobs[item.job]
            if job.started is None:
                job.started = now

    def _evaluate(self, batch: Sequence[Item]) -> list[Vector | ApplianceError]:
        """Return each input's vector, or why there is none; one that fails in company is tried alone."""
        inputs = [self._jobs[item.job].inputs[item.index] for item in batch]
        with self._cpu.turn():
            code, vectors = self.context.embed(inputs)
        if code == 0 and np.isfinite(vectors).all():
            self._failures = 0
            return _rows(vectors)
        if len(batch) > 1:
            LOGGER.warning("a batch of %d inputs failed (code %d): each is tried alone", len(batch), code)
            return [self._evaluate([item])[0] for item in batch]
        if code == 0:
            return [EngineError("The embedding of an input is not a number.", code="not_a_number")]
        self._failures += 1
        if self._failures >= FAILURES_UNTIL_DEAD:
            raise EngineError(f"{self._failures} inputs in a row failed (last code {code}).", code="engine_died")
        return [EngineError(f"llama.cpp failed to evaluate an input (code {code}).", advice="Send the request again.")]

    def _take(self, item: Item, vector: Vector | ApplianceError) -> None:
        job = self._jobs.get(item.job)
        if job is None:  # another input of it failed
            return
        if isinstance(vector, ApplianceError):
            self._end(item.job, vector)
            return
        job.vectors[item.index] = vector
        if item.index == len(job.inputs) - 1:  # inputs of a job come in order
            self._end(item.job, None)

    def _end(self, number: int, error: ApplianceError | None) -> None:
        self._ended.append((self._jobs[number], error))
        self._forget(number)

    def _forget(self, number: int) -> None:
        del self._jobs[number]
        self._batcher.cancel(number)

    def _end_everyone(self, error: ApplianceError | None) -> None:
        reason = error or EngineError(
            "The model was unloaded.", advice="Send the request again.", code="model_unloaded"
        )
        ended = [*self._ended, *((job, reason) for job in self._jobs.values())]
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, Embed):
                ended.append((command.job, reason))
        self._on_report(Report(ended, 0, 0.0))

    # Preparation

    def _new_context(self, model: LlamaModel) -> LlamaEmbeddingContext:
        config = self._config
        return LlamaEmbeddingContext(
            model,
            longest_input=config.longest_input,
            batch_tokens=config.batch_tokens,
            inputs=_most_inputs(model),
            threads=config.threads,
            flash_attention=config.flash_attention,
            on_piece=self._beat,
        )

    def _warm_up(self) -> None:
        """Page the weights in before anyone waits for it, and see that the model's vectors are numbers."""
        with self._cpu.turn():
            code, vectors = self.context.embed([array("i", [0] * min(64, self.context.longest_input))])
        if code:
            raise EngineError(f"The model cannot be evaluated (llama.cpp answered {code}).", code="engine_died")
        if not np.isfinite(vectors).all():
            raise EngineError("The model's vectors are not numbers: the file is damaged.", code="not_a_number")


def _most_inputs(model: LlamaModel) -> int:
    return MOST_INPUTS if model.memory.can_rewind else MOST_RECURRENT_INPUTS


def _rows(vectors: Vectors) -> list[Vector | ApplianceError]:
    return [array("f", row.tobytes()) for row in vectors]
