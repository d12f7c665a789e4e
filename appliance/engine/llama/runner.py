"""One loaded model at work: schedule → deliver → decode → sample.

Belongs to the worker's thread, as everything here does: the native handles, the scheduler and the choices in progress.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from appliance.core.errors import ApplianceError, EngineError, InvalidRequestError
from appliance.core.types import Delta
from appliance.engine.cpu_budget import CpuBudget, CpuShare
from appliance.engine.llama.choice import Choice, RunningChoice, joined
from appliance.engine.llama.commands import Cancel, Command, Forget, Report, Runtime, Submit
from appliance.engine.llama.config import EngineConfig
from appliance.engine.llama.context import Decoded, LlamaContext
from appliance.engine.llama.delivery import Delivery
from appliance.engine.llama.generation import Admitted, Failed, Gained, LlamaGeneration
from appliance.engine.llama.keeper import Fetched, FileJob, Found, StateKeeper, Written
from appliance.engine.llama.lora import Adapter, DropAdapter, LoadAdapter, LoadedAdapters
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.parked import ParkedStates
from appliance.engine.llama.sampling import Rows, not_a_number, token_logprob
from appliance.engine.llama.scheduler import Scheduler
from appliance.engine.llama.speculation import DRAFT_TOKENS
from appliance.engine.llama.step import Fork, Limits, Park, Resume, Run, Step, Truncate
from appliance.engine.llama.step import Sequence as ScheduledSequence

LOGGER = logging.getLogger("appliance.engine")
PROBE_CELLS = 64
"""Cells of the context in which a new adapter is tried."""
FAILURES_UNTIL_DEAD = 3
"""So many failed batches in a row, and the engine counts as broken: a restart is better than refusing everyone."""


class Runner:
    """Owns one model's native handles from construction to `close`.

    Attributes:
        model: Its vocabulary may be used by any thread.
        context: Its KV memory.
        scheduler: Who runs next.
        keeper: What is kept aside of those who do not run.
        blocked: Whether all that is left to do waits for a state to be read from disk.
    """

    def __init__(
        self,
        path: Path,
        config: EngineConfig,
        *,
        on_report: Callable[[Report], None],
        on_job: Callable[[FileJob], None],
        cpu: CpuBudget | None = None,
    ) -> None:
        """Load the model file and warm it up; where there is a CPU budget, compute in turns with others.

        Raises:
            ModelFileError: llama.cpp refuses the file.
            EngineError: There is not enough memory, or the model cannot be evaluated.
        """
        self._config = config
        self._delivery = Delivery(on_report, config.stream_interval_s)
        self._choices: dict[int, RunningChoice] = {}
        self._of_generation: dict[LlamaGeneration, list[RunningChoice]] = {}
        self._adapters = LoadedAdapters()
        self._numbers = 0
        self._failures = 0
        self._cpu = CpuShare(cpu, config.threads)
        self.blocked = False
        self.model = LlamaModel(path, gpu_layers=config.gpu_layers)
        try:
            self.context = self._new_context(config)
            try:
                self.keeper = self._new_keeper(on_job)
                self.scheduler = self._new_scheduler()
                self._warm_up()
            except BaseException:
                self.context.close()
                raise
        except BaseException:
            self.model.close()
            raise

    def close(self) -> None:
        """Free everything native."""
        self.context.close()
        self._adapters.close()
        self.model.close()

    @property
    def idle(self) -> bool:
        """Return True when nobody waits for anything."""
        return self.scheduler.idle

    def step(self) -> None:
        """Schedule → deliver → decode → sample.

        What a step brought is delivered while llama.cpp computes the next: then the event loop has the GIL for itself,
        and the next step does not wait for it.
        """
        step = self.scheduler.plan(time.monotonic())
        whole = self._move(step)
        self.keeper.fetch(step.fetches)
        self._note_admitted(step)
        self._delivery.tell_if_due(self.scheduler)
        if whole and step.runs and self._decode(step):
            self._sample(step)
        self.keeper.tend()
        self.blocked = not step.runs and self.keeper.fetching
        if self.scheduler.idle or not step.runs:
            self._deliver()

    def _move(self, step: Step) -> bool:
        """Carry out the memory operations; False if somebody's past could not be had, so that the batch is void."""
        lost = set()
        for operation in step.operations:
            match operation:
                case Park():
                    self.keeper.park(operation)
                case Resume():
                    if not self.keeper.resume(operation):
                        lost.add(operation.slot)
                case Fork():
                    if not self.context.apply(operation):
                        lost.add(operation.target)
                case Truncate():
                    if not self.context.apply(operation):
                        lost.add(operation.slot)
        for sequence in [each for each in self.scheduler.running if each.slot in lost]:
            self.scheduler.lost(sequence)
        return not lost

    def rest(self) -> None:
        """Do what there is time for when nobody waits."""
        self._park_idle(stays=True)
        self.keeper.tend()

    def park_everything(self) -> None:
        """Have what the idle slots hold, and what is kept aside in RAM, written to disk: the model is about to go."""
        self._park_idle()
        self.keeper.flush()

    def _park_idle(self, *, stays: bool = False) -> None:
        """Keep copies of what the idle slots hold, so that it is not lost with them."""
        for operation in self.scheduler.residents.pasts():
            self.keeper.park(operation, stays=stays)

    def carry_out(self, command: Command) -> None:
        """Do what the loop asks for; it takes effect before the next step."""
        match command:
            case Found() | Written() | Fetched():
                self.keeper.take(command)
            case Cancel(generation):
                for running in self._of_generation.pop(generation, []):
                    self.scheduler.cancel(running.sequence)
                    self._forget(running)
            case Forget(sessions, done):
                self.scheduler.forget(sessions)
                self.keeper.forget(sessions, done)
            case Submit(choices):
                for choice in choices:
                    self._start(choice)
            case Runtime(threads, batch_tokens, target):
                self.context.set_threads(threads)
                self._cpu.threads = threads
                scheduler = self.scheduler
                scheduler.limits = replace(scheduler.limits, batch_tokens=batch_tokens, target_latency=target)
            case LoadAdapter(adapter, done):
                self._load_adapter(adapter, done)
            case DropAdapter(number, done):
                self._adapters.drop(number, self.context)
                self.scheduler.turns.forget(number)
                done(None)

    def _load_adapter(self, adapter: Adapter, done: Callable[[ApplianceError | None], None]) -> None:
        trial = replace(self._config, cells=PROBE_CELLS, sequences=1, batch_tokens=PROBE_CELLS)
        try:
            self._adapters.load(adapter, self.model, lambda: self._new_context(trial))
        except ApplianceError as error:
            done(error)
        else:
            done(None)

    def _start(self, choice: Choice) -> None:
        self._numbers += 1
        running = RunningChoice.start(choice, self._numbers, self.model)
        try:
            self.scheduler.submit(running.sequence)
        except ValueError as error:
            running.sampler.close()
            refusal = InvalidRequestError(f"The prompt does not fit: {error}.", param="prompt")
            self._delivery.add(choice.generation, Failed(refusal, time.monotonic()))
            return
        self._choices[running.sequence.id] = running
        self._of_generation.setdefault(choice.generation, []).append(running)

    def _note_admitted(self, step: Step) -> None:
        now = time.monotonic()
        for sequence in step.admitted:
            running = self._choices[sequence.id]
            if running.generated == 0:
                self._delivery.add(running.choice.generation, Admitted(sequence.cached, now))

    def _decode(self, step: Step) -> bool:
        """Evaluate the batch; returns whether there are logits to sample from."""
        self.context.use(self._adapters.get(step.adapter))
        with self._cpu.turn():
            started = time.perf_counter()
            code = self.context.decode(step.runs)
            seconds = time.perf_counter() - started
        if code == Decoded.OK:
            self.scheduler.complete(step, seconds)
            self._failures = 0
            return True
        if code == Decoded.NO_ROOM:
            self.scheduler.refuse()
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
        logits = self.context.logits()
        likeliest = logits.argmax(axis=1)  # NaN and infinity win too, so one number of each row tells of all
        rows = Rows(logits, likeliest, np.isfinite(logits[np.arange(len(likeliest)), likeliest]))
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
            self._fail_one(self._choices[step.runs[-1].sequence.id], not_a_number())
        self.scheduler.start_over()
        self.context.clear(data=True)

    def _sample_run(self, run: Run, first: int, rows: Rows, now: float) -> None:
        """Sample a run's rows in order, as long as what was sampled is the draft that the next row stands on.

        Every token is drawn as if it came alone: from the logits after those before it, by the same sampler in the same
        state. So drafts change how fast tokens come, and not which.
        """
        running = self._choices[run.sequence.id]
        deltas: list[Delta] = []
        for accepted in range(1 + len(run.drafts)):
            row = first + accepted
            try:
                token, delta = self._sample_one(running, row, rows)
            except ApplianceError as error:
                self._fail_one(running, error)
                return
            if delta is not None:
                deltas.append(delta)
            ended = delta is not None and delta.finish_reason is not None
            if ended or accepted == len(run.drafts) or token != run.drafts[accepted]:
                break
        if run.drafts:
            self._confirm(run, accepted)
        gained = joined(deltas)
        if gained is not None:
            self._delivery.add(running.choice.generation, Gained(gained, now))
        if ended:
            self._finish(running)
        else:
            self.scheduler.append(running.sequence, token)

    def _finish(self, running: RunningChoice) -> None:
        sequence, slot = running.sequence, running.sequence.slot
        self.scheduler.finish(sequence)
        if running.choice.pinned and slot is not None and sequence.kept:
            tokens = sequence.tokens[: sequence.evaluated]
            self.keeper.pin(Park(slot, tokens, sequence.adapter, sequence.session))
        self._forget(running)

    def _sample_one(self, running: RunningChoice, row: int, rows: Rows) -> tuple[int, Delta | None]:
        """Return the token sampled from one row, and what of the answer can be sent by that; raises as `sample`."""
        token = running.sampler.sample(self.context, row, rows)
        top = running.choice.sampling.top_logprobs
        logprob = None if top is None else token_logprob(self.model, rows.logits, row, token, top)
        return token, running.take(token, self.model, logprob)

    def _confirm(self, run: Run, accepted: int) -> None:
        rest = self.scheduler.confirm(run, accepted)
        if not self.context.apply(rest):
            self.scheduler.lost(run.sequence)
        self._delivery.add_drafts(len(run.drafts), accepted)

    def _fail_one(self, running: RunningChoice, error: ApplianceError) -> None:
        self.scheduler.drop(running.sequence)
        self._delivery.add(running.choice.generation, Failed(error, time.monotonic()))
        self._forget(running)

    def _deliver(self) -> None:
        scheduler = self.scheduler
        self._delivery.tell(len(scheduler.running), scheduler.ledger.used)
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

    def end(self, reason: ApplianceError) -> None:
        """End every choice with an error."""
        for running in list(self._choices.values()):
            self._delivery.add(running.choice.generation, Failed(reason, time.monotonic()))
            self._forget(running)
        self._delivery.tell(0, 0)

    # Preparation

    def _new_context(self, config: EngineConfig) -> LlamaContext:
        return LlamaContext(
            self.model,
            cells=config.cells,
            slots=config.slots,
            batch_tokens=config.batch_tokens,
            threads=config.threads,
            flash_attention=config.flash_attention,
            kv_cache_type=config.kv_cache_type,
            draft_tokens=self._draft_limit,
        )

    def _new_scheduler(self) -> Scheduler:
        config, memory = self._config, self.model.memory
        return Scheduler(
            Limits(
                cells=config.cells,
                slots=config.slots,
                batch_tokens=config.batch_tokens,
                target_latency=config.target_inter_token_latency_s,
                can_rewind=memory.can_rewind,
                can_rewind_states=memory.can_rewind_states,
                running=config.sequences,
                draft_tokens=self._draft_limit,
            ),
            self.keeper.states if config.parking_ram_bytes else None,
            shortest=self.context.shortest if memory.window else None,
        )

    def _new_keeper(self, on_job: Callable[[FileJob], None]) -> StateKeeper:
        config = self._config
        states = ParkedStates(
            ram_bytes=config.parking_ram_bytes,
            disk_bytes=config.parking_disk_bytes if config.parking_ram_bytes and config.parking_dir is not None else 0,
            can_rewind=self.model.memory.can_rewind_states,
        )
        return StateKeeper(self.context, states, on_job=on_job, write_after_s=config.parking_delay_s)

    @property
    def _draft_limit(self) -> int:
        """Return the most guessed tokens of a step; a memory that cannot rewind cannot forget the wrong ones."""
        return DRAFT_TOKENS if self._config.speculation == "auto" and self.model.memory.can_rewind else 0

    def _warm_up(self) -> None:
        """Page the weights in and learn what a prompt token and a decode step cost, before anyone waits for it."""
        prompt = array("i", [0]) * min(64, self._config.batch_tokens, self._config.cells - 2)
        sequence = ScheduledSequence(0, prompt)
        sequence.slot = 0
        cost = self.scheduler.cost
        for start, count in ((0, len(prompt) - 1), (len(prompt) - 1, 1)):
            with self._cpu.turn():
                started = time.perf_counter()
                code = self.context.decode([Run(sequence, start, count, sample=True)])
                seconds = time.perf_counter() - started
            if code != Decoded.OK:
                raise EngineError(f"The model cannot be evaluated (llama_decode answered {code}).", code="engine_died")
            if not np.isfinite(self.context.logits().max()):
                raise EngineError("The model's answers are not numbers: the file is damaged.", code="not_a_number")
            prefill_tokens = 0 if count == 1 else count
            cost.observe(decoding=int(count == 1), prefill_tokens=prefill_tokens, cells=start, seconds=seconds)
        self.context.clear()
