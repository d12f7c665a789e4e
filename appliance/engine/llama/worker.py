"""The thread of one model: it owns every native handle and is the only one to touch the scheduler.

It takes commands from one queue, and answers with one call to the event loop a step. Its heartbeat is a number that it
raises whenever it goes round; nobody ever waits for it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from appliance.core.errors import ApplianceError, EngineError, InvalidRequestError
from appliance.engine.llama.choice import Choice, RunningChoice
from appliance.engine.llama.context import Decoded, LlamaContext, Logits
from appliance.engine.llama.generation import Admitted, Event, Failed, Gained, LlamaGeneration
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.sampling import token_logprob
from appliance.engine.llama.scheduler import Scheduler
from appliance.engine.llama.step import Limits, Run, Step
from appliance.engine.llama.step import Sequence as ScheduledSequence

LOGGER = logging.getLogger("appliance.engine")
IDLE_BEAT_S = 1.0
"""How often an idle worker goes round, for its heartbeat."""
FAILURES_UNTIL_DEAD = 3
"""So many failed batches in a row, and the engine counts as broken: a restart is better than refusing everyone."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What a model is run with, see the settings of the same names; `context_limit` is of one request, in tokens."""

    cells: int
    sequences: int
    batch_tokens: int
    threads: int
    gpu_layers: int
    target_inter_token_latency_s: float
    queue_size: int
    context_limit: int = 2**31 - 1
    flash_attention: Literal["auto", "on", "off"] = "auto"


@dataclass(frozen=True, slots=True)
class Submit:
    """Start the choices of one request."""

    choices: Sequence[Choice]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget all choices of one request."""

    generation: LlamaGeneration


Command = Submit | Cancel


@dataclass(frozen=True, slots=True)
class Report:
    """What a step brought: events in order, and how full the engine is."""

    events: Sequence[tuple[LlamaGeneration, Event]]
    running: int
    used_cells: int


class Worker:
    """Runs one model in its own thread until `stop`.

    Attributes:
        model: Set before `on_ready` is called; its vocabulary may be used by any thread.
        beat_at: Monotonic time of the last heartbeat.
    """

    def __init__(
        self,
        path: Path,
        config: EngineConfig,
        *,
        on_ready: Callable[[LlamaModel], None],
        on_report: Callable[[Report], None],
        on_end: Callable[[ApplianceError | None], None],
    ) -> None:
        """Prepare a thread for the model file; the callbacks are called in that thread."""
        self._path = path
        self._config = config
        self._on_ready, self._on_report, self._on_end = on_ready, on_report, on_end
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._choices: dict[int, RunningChoice] = {}
        self._of_generation: dict[LlamaGeneration, list[RunningChoice]] = {}
        self._events: list[tuple[LlamaGeneration, Event]] = []
        self._numbers = 0
        self._failures = 0
        self.beat_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"llama {path.name[:16]}", daemon=True)

    def start(self) -> None:
        """Start loading; `on_ready` or `on_end` follows."""
        self._thread.start()

    def put(self, command: Command) -> None:
        """Hand over a command; it takes effect before the next step."""
        self._inbox.put(command)

    def stop(self) -> None:
        """End after the current step; open choices end with an error."""
        self._inbox.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; returns False if the thread is still busy after the timeout."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # The thread

    def _run(self) -> None:
        error: ApplianceError | None = None
        model: LlamaModel | None = None
        context: LlamaContext | None = None
        try:
            model = LlamaModel(self._path, gpu_layers=self._config.gpu_layers)
            context = self._new_context(model)
            self._scheduler = self._new_scheduler(model)
            self._model, self._context = model, context
            self._warm_up()
            self._on_ready(model)
            while self._take_commands():
                self._step()
        except ApplianceError as failure:
            error = failure
        except Exception as failure:  # whatever killed the thread: the process must hear of it
            LOGGER.exception("the engine thread of %s died", self._path.name)
            error = EngineError(f"The engine thread died: {failure}.", code="engine_died")
        finally:
            self._end_everyone(error)
            if context is not None:
                context.close()
            if model is not None:
                model.close()
            self._on_end(error)

    def _step(self) -> None:
        """Schedule → decode → sample → deliver."""
        step = self._scheduler.plan()
        for operation in step.operations:
            self._context.apply(operation)
        self._note_admitted(step)
        if step.runs and self._decode(step):
            self._sample(step)
        self._deliver()

    def _take_commands(self) -> bool:
        """Carry out what waits; when idle, wait for it. Returns False when the worker is to stop."""
        idle = self._scheduler.idle
        while True:
            self.beat_at = time.monotonic()
            try:
                command = self._inbox.get(timeout=IDLE_BEAT_S) if idle else self._inbox.get_nowait()
            except queue.Empty:
                if idle:
                    continue
                return True
            if command is None:
                return False
            self._carry_out(command)
            idle = False

    def _carry_out(self, command: Command) -> None:
        match command:
            case Cancel(generation):
                for running in self._of_generation.pop(generation, []):
                    self._scheduler.cancel(running.sequence)
                    self._forget(running)
            case Submit(choices):
                for choice in choices:
                    self._start(choice)

    def _start(self, choice: Choice) -> None:
        self._numbers += 1
        running = RunningChoice.start(choice, self._numbers, self._model)
        try:
            self._scheduler.submit(running.sequence)
        except ValueError as error:
            running.sampler.close()
            refusal = InvalidRequestError(f"The prompt does not fit: {error}.", param="prompt")
            self._emit(choice, Failed(refusal, time.monotonic()))
            return
        self._choices[running.sequence.id] = running
        self._of_generation.setdefault(choice.generation, []).append(running)

    def _note_admitted(self, step: Step) -> None:
        now = time.monotonic()
        for sequence in step.admitted:
            running = self._choices[sequence.id]
            if running.generated == 0:
                self._emit(running.choice, Admitted(sequence.cached, now))

    def _decode(self, step: Step) -> bool:
        """Evaluate the batch; returns whether there are logits to sample from."""
        started = time.perf_counter()
        code = self._context.decode(step.runs)
        if code == Decoded.OK:
            self._scheduler.complete(step, time.perf_counter() - started)
            self._failures = 0
            return True
        if code == Decoded.NO_ROOM:
            self._scheduler.refuse()
            return False
        self._failures += 1
        LOGGER.error("llama_decode failed with %d on a batch of %d sequences", code, len(step.runs))
        error = EngineError(f"llama.cpp failed to decode the batch (code {code}).", advice="Send the request again.")
        if self._failures >= FAILURES_UNTIL_DEAD:
            raise EngineError(f"{self._failures} batches in a row failed (last code {code}).", code="engine_died")
        for run in step.runs:
            self._fail_one(self._choices[run.sequence.id], error)
        return False

    def _sample(self, step: Step) -> None:
        sampled = [run for run in step.runs if run.sample]
        if not sampled:
            return
        logits = self._context.logits()
        likeliest = logits.argmax(axis=1)  # NaN and infinity win too, so one number of each row tells of all
        finite = np.isfinite(logits[np.arange(len(sampled)), likeliest])
        now = time.monotonic()
        for row, run in enumerate(sampled):
            running = self._choices[run.sequence.id]
            if finite[row]:
                self._sample_one(running, row, int(likeliest[row]), logits, now)
            else:
                self._fail_one(running, EngineError("The model's answer is not a number.", code="not_a_number"))

    def _sample_one(self, running: RunningChoice, row: int, likeliest: int, logits: Logits, now: float) -> None:
        token = running.sampler.sample(self._context, row, logits, likeliest)
        top = running.choice.sampling.top_logprobs
        logprob = None if top is None else token_logprob(self._model, logits, row, token, top)
        delta = running.take(token, self._model, logprob)
        if delta is not None:
            self._emit(running.choice, Gained(delta, now))
        if delta is not None and delta.finish_reason is not None:
            self._scheduler.finish(running.sequence)
            self._forget(running)
        else:
            self._scheduler.append(running.sequence, token)

    def _fail_one(self, running: RunningChoice, error: ApplianceError) -> None:
        self._scheduler.drop(running.sequence)
        self._emit(running.choice, Failed(error, time.monotonic()))
        self._forget(running)

    def _emit(self, choice: Choice, event: Event) -> None:
        self._events.append((choice.generation, event))

    def _deliver(self) -> None:
        events, self._events = self._events, []
        scheduler = self._scheduler
        self._on_report(Report(events, len(scheduler.running), scheduler.ledger.used))
        if scheduler.idle:
            scheduler.check_integrity()

    def _forget(self, running: RunningChoice) -> None:
        running.sampler.close()
        del self._choices[running.sequence.id]
        siblings = self._of_generation.get(running.choice.generation, [])
        if running in siblings:
            siblings.remove(running)
        if not siblings:
            self._of_generation.pop(running.choice.generation, None)

    def _end_everyone(self, error: ApplianceError | None) -> None:
        reason = error or EngineError(
            "The model was unloaded.", advice="Send the request again.", code="model_unloaded"
        )
        for running in list(self._choices.values()):
            self._emit(running.choice, Failed(reason, time.monotonic()))
            self._forget(running)
        while not self._inbox.empty():
            command = self._inbox.get()
            for choice in command.choices if isinstance(command, Submit) else ():
                self._emit(choice, Failed(reason, time.monotonic()))
        self._on_report(Report(self._events, 0, 0))

    # Preparation

    def _new_context(self, model: LlamaModel) -> LlamaContext:
        config = self._config
        return LlamaContext(
            model,
            cells=config.cells,
            slots=config.sequences,
            batch_tokens=config.batch_tokens,
            threads=config.threads,
            flash_attention=config.flash_attention,
        )

    def _new_scheduler(self, model: LlamaModel) -> Scheduler:
        config = self._config
        return Scheduler(
            Limits(
                cells=config.cells,
                slots=config.sequences,
                batch_tokens=config.batch_tokens,
                target_latency=config.target_inter_token_latency_s,
                can_rewind=model.can_rewind,
            )
        )

    def _warm_up(self) -> None:
        """Page the weights in and learn what a prompt token and a decode step cost, before anyone waits for it."""
        prompt = array("i", [0]) * min(64, self._config.batch_tokens, self._config.cells - 2)
        sequence = ScheduledSequence(0, prompt)
        sequence.slot = 0
        cost = self._scheduler.cost
        for start, count in ((0, len(prompt) - 1), (len(prompt) - 1, 1)):
            started = time.perf_counter()
            code = self._context.decode([Run(sequence, start, count, sample=True)])
            seconds = time.perf_counter() - started
            if code != Decoded.OK:
                raise EngineError(f"The model cannot be evaluated (llama_decode answered {code}).", code="engine_died")
            if not np.isfinite(self._context.logits().max()):
                raise EngineError("The model's answers are not numbers: the file is damaged.", code="not_a_number")
            prefill_tokens = 0 if count == 1 else count
            cost.observe(decoding=int(count == 1), prefill_tokens=prefill_tokens, cells=start, seconds=seconds)
        self._context.clear()
