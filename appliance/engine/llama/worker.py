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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from appliance.core.errors import ApplianceError, EngineError, InvalidRequestError
from appliance.core.types import Delta
from appliance.engine.llama.choice import Choice, RunningChoice, joined
from appliance.engine.llama.config import EngineConfig
from appliance.engine.llama.context import Decoded, LlamaContext, Logits
from appliance.engine.llama.generation import Admitted, Event, Failed, Gained, LlamaGeneration
from appliance.engine.llama.keeper import Fetched, FileJob, Found, Outcome, StateKeeper, Written
from appliance.engine.llama.lora import Adapter, DropAdapter, LoadAdapter, LoadedAdapters
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.parked import ParkedStates
from appliance.engine.llama.sampling import token_logprob
from appliance.engine.llama.scheduler import Scheduler
from appliance.engine.llama.speculation import DRAFT_TOKENS
from appliance.engine.llama.step import Fork, Limits, Park, Resume, Run, Step, Truncate
from appliance.engine.llama.step import Sequence as ScheduledSequence

LOGGER = logging.getLogger("appliance.engine")
IDLE_BEAT_S = 1.0
"""How often an idle worker goes round, for its heartbeat."""
PROBE_CELLS = 64
"""Cells of the context in which a new adapter is tried."""
FAILURES_UNTIL_DEAD = 3
"""So many failed batches in a row, and the engine counts as broken: a restart is better than refusing everyone."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Start the choices of one request."""

    choices: Sequence[Choice]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget all choices of one request."""

    generation: LlamaGeneration


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the engine runs with, see the settings of the same names; as a command, go on with these checked values."""

    threads: int
    batch_tokens: int
    target_inter_token_latency_s: float


Command = Submit | Cancel | Runtime | LoadAdapter | DropAdapter | Outcome


@dataclass(frozen=True, slots=True)
class Report:
    """What a step brought: events in order, how full the engine is, how many guesses were checked and were right."""

    events: Sequence[tuple[LlamaGeneration, Event]]
    running: int
    used_cells: int
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Rows:
    """The logits of a batch, shape (rows, vocabulary); of each row the likeliest token, and whether all is finite."""

    logits: Logits
    likeliest: npt.NDArray[np.intp]
    finite: npt.NDArray[np.bool_]


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
        on_job: Callable[[FileJob], None],
    ) -> None:
        """Prepare a thread for the model file; the callbacks are called in that thread."""
        self._path = path
        self._config = config
        self._on_ready, self._on_report, self._on_end, self._on_job = on_ready, on_report, on_end, on_job
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._choices: dict[int, RunningChoice] = {}
        self._of_generation: dict[LlamaGeneration, list[RunningChoice]] = {}
        self._adapters = LoadedAdapters()
        self._events: list[tuple[LlamaGeneration, Event]] = []
        self._numbers = 0
        self._draft_tokens = self._accepted_tokens = 0
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
            context = self._new_context(model, self._config)
            self._keeper = self._new_keeper(model, context)
            self._scheduler = self._new_scheduler(model, context)
            self._model, self._context = model, context
            self._warm_up()
            self._on_ready(model)
            while self._take_commands():
                self._step()
            self._park_idle()
            self._keeper.flush()
        except ApplianceError as failure:
            error = failure
        except Exception as failure:  # whatever killed the thread: the process must hear of it
            LOGGER.exception("the engine thread of %s died", self._path.name)
            error = EngineError(f"The engine thread died: {failure}.", code="engine_died")
        finally:
            self._end_everyone(error)
            if context is not None:
                context.close()
            self._adapters.close()
            if model is not None:
                model.close()
            self._on_end(error)

    def _step(self) -> None:
        """Schedule → decode → sample → deliver."""
        step = self._scheduler.plan(time.monotonic())
        whole = self._move(step)
        self._keeper.fetch(step.fetches)
        self._note_admitted(step)
        if whole and step.runs and self._decode(step):
            self._sample(step)
        self._deliver()
        self._keeper.tend()

    def _move(self, step: Step) -> bool:
        """Carry out the memory operations; False if somebody's past could not be had, so that the batch is void."""
        lost = set()
        for operation in step.operations:
            match operation:
                case Park():
                    self._keeper.park(operation)
                case Resume():
                    if not self._keeper.resume(operation):
                        lost.add(operation.slot)
                case Fork():
                    if not self._context.apply(operation):
                        lost.add(operation.target)
                case Truncate():
                    if not self._context.apply(operation):
                        lost.add(operation.slot)
        for sequence in [each for each in self._scheduler.running if each.slot in lost]:
            self._scheduler.lost(sequence)
        return not lost

    def _park_idle(self) -> None:
        """Keep copies of what the idle slots hold, so that it is not lost with them."""
        for operation in self._scheduler.residents.pasts():
            self._keeper.park(operation)

    def _take_commands(self) -> bool:
        """Carry out what waits; when idle, wait for it. Returns False when the worker is to stop."""
        idle = self._scheduler.idle
        while True:
            self.beat_at = time.monotonic()
            try:
                command = self._inbox.get(timeout=IDLE_BEAT_S) if idle else self._inbox.get_nowait()
            except queue.Empty:
                if idle:
                    self._rest()
                    continue
                return True
            if command is None:
                return False
            self._carry_out(command)
            idle = False

    def _rest(self) -> None:
        """Do what there is time for when nobody waits."""
        self._park_idle()
        self._keeper.tend()

    def _carry_out(self, command: Command) -> None:
        match command:
            case Found() | Written() | Fetched():
                self._keeper.take(command)
            case Cancel(generation):
                for running in self._of_generation.pop(generation, []):
                    self._scheduler.cancel(running.sequence)
                    self._forget(running)
            case Submit(choices):
                for choice in choices:
                    self._start(choice)
            case Runtime(threads, batch_tokens, target):
                self._context.set_threads(threads)
                scheduler = self._scheduler
                scheduler.limits = replace(scheduler.limits, batch_tokens=batch_tokens, target_latency=target)
            case LoadAdapter(adapter, done):
                self._load_adapter(adapter, done)
            case DropAdapter(number, done):
                self._adapters.drop(number, self._context)
                self._scheduler.turns.forget(number)
                done(None)

    def _load_adapter(self, adapter: Adapter, done: Callable[[ApplianceError | None], None]) -> None:
        trial = replace(self._config, cells=PROBE_CELLS, sequences=1, batch_tokens=PROBE_CELLS)
        try:
            self._adapters.load(adapter, self._model, lambda: self._new_context(self._model, trial))
        except ApplianceError as error:
            done(error)
        else:
            done(None)

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
        self._context.use(self._adapters.get(step.adapter))
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
        watched = bool(step.adapter) and not step.runs[-1].sample  # then the last row is of a prompt's token
        if not sampled and not watched:
            return
        logits = self._context.logits()
        likeliest = logits.argmax(axis=1)  # NaN and infinity win too, so one number of each row tells of all
        rows = _Rows(logits, likeliest, np.isfinite(logits[np.arange(len(likeliest)), likeliest]))
        now = time.monotonic()
        first = 0
        for run in sampled:
            self._sample_run(run, first, rows, now)
            first += 1 + len(run.drafts)
        if not rows.finite.all():
            self._start_over(step, watched=watched and not rows.finite[-1])

    def _start_over(self, step: Step, *, watched: bool) -> None:
        """Keep what is not a number from spreading: in the memory that all share, it would reach every sequence."""
        LOGGER.error("a batch under %r gave what is not a number; everyone's cells are computed anew", step.adapter)
        if watched:
            self._fail_one(self._choices[step.runs[-1].sequence.id], _not_a_number())
        self._scheduler.start_over()
        self._context.clear(data=True)

    def _sample_run(self, run: Run, first: int, rows: _Rows, now: float) -> None:
        """Sample a run's rows in order, as long as what was sampled is the draft that the next row stands on.

        Every token is drawn as if it came alone: from the logits after those before it, by the same sampler in the same
        state. So drafts change how fast tokens come, and not which.
        """
        running = self._choices[run.sequence.id]
        deltas: list[Delta] = []
        for accepted in range(1 + len(run.drafts)):
            row = first + accepted
            if not rows.finite[row]:
                self._fail_one(running, _not_a_number())
                return
            token, delta = self._sample_one(running, row, rows)
            if delta is not None:
                deltas.append(delta)
            ended = delta is not None and delta.finish_reason is not None
            if ended or accepted == len(run.drafts) or token != run.drafts[accepted]:
                break
        if run.drafts:
            self._confirm(run, accepted)
        gained = joined(deltas)
        if gained is not None:
            self._emit(running.choice, Gained(gained, now))
        if ended:
            self._scheduler.finish(running.sequence)
            self._forget(running)
        else:
            self._scheduler.append(running.sequence, token)

    def _sample_one(self, running: RunningChoice, row: int, rows: _Rows) -> tuple[int, Delta | None]:
        """Return the token sampled from one row, and what of the answer can be sent by that."""
        token = running.sampler.sample(self._context, row, rows.logits, int(rows.likeliest[row]))
        top = running.choice.sampling.top_logprobs
        logprob = None if top is None else token_logprob(self._model, rows.logits, row, token, top)
        return token, running.take(token, self._model, logprob)

    def _confirm(self, run: Run, accepted: int) -> None:
        rest = self._scheduler.confirm(run, accepted)
        if not self._context.apply(rest):
            self._scheduler.lost(run.sequence)
        self._draft_tokens += len(run.drafts)
        self._accepted_tokens += accepted

    def _fail_one(self, running: RunningChoice, error: ApplianceError) -> None:
        self._scheduler.drop(running.sequence)
        self._emit(running.choice, Failed(error, time.monotonic()))
        self._forget(running)

    def _emit(self, choice: Choice, event: Event) -> None:
        self._events.append((choice.generation, event))

    def _deliver(self) -> None:
        events, self._events = self._events, []
        scheduler = self._scheduler
        checked, right = self._draft_tokens, self._accepted_tokens
        self._draft_tokens = self._accepted_tokens = 0
        self._on_report(Report(events, len(scheduler.running), scheduler.ledger.used, checked, right))
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
            match command:
                case Submit(choices):
                    for choice in choices:
                        self._emit(choice, Failed(reason, time.monotonic()))
                case LoadAdapter(_, done) | DropAdapter(_, done):
                    done(reason)
        self._on_report(Report(self._events, 0, 0))

    # Preparation

    def _new_context(self, model: LlamaModel, config: EngineConfig) -> LlamaContext:
        return LlamaContext(
            model,
            cells=config.cells,
            slots=config.slots,
            batch_tokens=config.batch_tokens,
            threads=config.threads,
            flash_attention=config.flash_attention,
            kv_cache_type=config.kv_cache_type,
            draft_tokens=self._draft_limit(model),
        )

    def _new_scheduler(self, model: LlamaModel, context: LlamaContext) -> Scheduler:
        config = self._config
        return Scheduler(
            Limits(
                cells=config.cells,
                slots=config.slots,
                batch_tokens=config.batch_tokens,
                target_latency=config.target_inter_token_latency_s,
                can_rewind=model.memory.can_rewind,
                can_rewind_states=model.memory.can_rewind_states,
                running=config.sequences,
                draft_tokens=self._draft_limit(model),
            ),
            self._keeper.states if config.parking_ram_bytes else None,
            shortest=context.shortest if model.memory.window else None,
        )

    def _new_keeper(self, model: LlamaModel, context: LlamaContext) -> StateKeeper:
        config = self._config
        states = ParkedStates(
            ram_bytes=config.parking_ram_bytes,
            disk_bytes=config.parking_disk_bytes,
            can_rewind=model.memory.can_rewind_states,
        )
        return StateKeeper(context, states, on_job=self._on_job, write_after_s=config.parking_delay_s)

    def _draft_limit(self, model: LlamaModel) -> int:
        """Return the most guessed tokens of a step; a memory that cannot rewind cannot forget the wrong ones."""
        return DRAFT_TOKENS if self._config.speculation == "auto" and model.memory.can_rewind else 0

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


def _not_a_number() -> EngineError:
    return EngineError("The model's answer is not a number.", code="not_a_number")
