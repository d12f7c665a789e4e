"""A loaded model as the event loop sees it: submit work, take what comes, know how it is doing.

Everything here runs on the loop. The thread is reached by its queue of commands, and reaches back by one
`call_soon_threadsafe` a step.
"""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from appliance.core.errors import ApplianceError, EngineError, InvalidRequestError, OverloadedError
from appliance.core.types import Priority, SamplingParams
from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.llama.choice import Choice
from appliance.engine.llama.commands import Cancel, Command, Forget, Report, Runtime, Submit
from appliance.engine.llama.config import EngineConfig
from appliance.engine.llama.constraint import Constraint, Grammars
from appliance.engine.llama.file_lane import FileLane
from appliance.engine.llama.generation import Admitted, LlamaGeneration
from appliance.engine.llama.keeper import EraseForGood, FileJob, WriteState, Written
from appliance.engine.llama.lora import Adapter, DropAdapter, LoadAdapter
from appliance.engine.llama.meter import EngineMeter
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.posting import post
from appliance.engine.llama.prompt_check import check_prompt
from appliance.engine.llama.worker import Worker
from appliance.observe.metrics import ModelMetrics

INLINE_TOKENIZE_CHARACTERS = 20_000
"""Longer texts are tokenized off the loop; shorter ones take a few milliseconds at most."""
STOP_TIMEOUT_S = 30.0
LONGEST_RETRY_AFTER_S = 60.0


class LlamaEngine:
    """One loaded GGUF model.

    Attributes:
        name: The full `name:version`, for answers and metrics.
        runtime: What it runs with; `tune` changes it.
        ended: Done when the thread has ended; its result is the error that ended it, or None after `close`.
    """

    def __init__(
        self, name: str, path: Path, config: EngineConfig, metrics: ModelMetrics, cpu: CpuBudget | None = None
    ) -> None:
        """Prepare an engine; `load` makes one that runs."""
        self.name = name
        self.config = config
        self.runtime = Runtime(config.threads, config.batch_tokens, config.target_inter_token_latency_s)
        self._meter = EngineMeter(metrics)
        self._loop = loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[ApplianceError | None] = loop.create_future()
        self._ready: asyncio.Future[LlamaModel] = loop.create_future()
        self._open: set[LlamaGeneration] = set()
        self._adapters: set[str] = set()
        self._worker = Worker(
            path,
            config,
            on_ready=lambda model: post(loop, self._ready.set_result, model),
            on_report=lambda report: post(loop, self._take_report, report),
            on_end=lambda error: post(loop, self._take_end, error),
            on_job=lambda job: post(loop, self._take_job, job),
            cpu=cpu,
        )
        self._lane: FileLane | None = None

    @classmethod
    async def load(
        cls, name: str, path: Path, config: EngineConfig, metrics: ModelMetrics, cpu: CpuBudget | None = None
    ) -> LlamaEngine:
        """Load the file in a new thread, warm it up, and return the engine that then runs.

        Args:
            name: The full `name:version`.
            path: The GGUF file.
            config: How to run it.
            metrics: Where to count.
            cpu: Whom to ask before computing on the CPU; None asks nobody.

        Raises:
            ModelFileError: llama.cpp refuses the file.
            EngineError: There is not enough memory, or the model cannot be evaluated.
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
        if config.parking_dir is not None:
            engine._lane = await FileLane.open(config.parking_dir, config.origin, engine._worker.put)
        return engine

    def share_model(self) -> LlamaModel:
        """Return the weights for another context; whoever takes them closes them.

        Raises:
            EngineError: The model was unloaded.
        """
        return self._model.share()

    @property
    def states_folder(self) -> str | None:
        """Return the name of the folder of parked states that it has to itself; None if it has none."""
        return None if self._lane is None else self.config.origin.fingerprint

    # What the model is

    @property
    def _model(self) -> LlamaModel:
        return self._ready.result()

    @cached_property
    def grammars(self) -> Grammars:
        """Return what compiles grammars for `submit`."""
        return Grammars(self._model)

    @property
    def context_length(self) -> int:
        """Return how many tokens prompt and answer of one choice may have together."""
        return min(self.config.cells, self.config.context_limit, self._model.training_context)

    @property
    def chat_template(self) -> str | None:
        """Return the model file's own chat template, untrusted."""
        return self._model.chat_template

    @property
    def begin_text(self) -> str:
        """Return the begin-of-sequence token as text."""
        return self._model.begin_text

    @property
    def end_text(self) -> str:
        """Return the end-of-sequence token as text."""
        return self._model.end_text

    @property
    def adds_begin(self) -> bool:
        """Return True if tokenizing with `add_special` puts the begin token first."""
        return self._model.adds_begin

    @property
    def control_texts(self) -> list[str]:
        """Return every text that `parse_special=True` would read as a control token."""
        return self._model.control_texts

    @property
    def vocabulary_size(self) -> int:
        """Return the number of token ids."""
        return self._model.vocabulary_size

    def piece(self, token: int) -> bytes:
        """Return a token's bytes; empty for control tokens."""
        return self._model.piece(token)

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the text's token ids; long texts do not hold up the loop."""
        if len(text) <= INLINE_TOKENIZE_CHARACTERS:
            return self._model.tokenize(text, add_special=add_special, parse_special=parse_special)
        return await asyncio.to_thread(self._model.tokenize, text, add_special=add_special, parse_special=parse_special)

    # Adapters

    @property
    def adapters(self) -> frozenset[str]:
        """Return the ids of the adapters that are loaded."""
        return frozenset(self._adapters)

    async def load_adapter(self, adapter: Adapter) -> None:
        """Load an adapter beside those that are loaded, if it is not; others go on meanwhile, but for its reading.

        Raises:
            ModelFileError: llama.cpp refuses the file.
            EngineError: It gives answers that are not numbers, there is not enough memory, or the engine has ended.
        """
        self._check_alive()
        if adapter.id not in self._adapters:
            await self._command(lambda done: LoadAdapter(adapter, done))
            self._adapters.add(adapter.id)

    async def drop_adapter(self, number: str) -> None:
        """Free an adapter.

        Raises:
            EngineError: An open request uses it, or the engine has ended; nothing was changed.
        """
        if any(each.adapter == number for each in self._open):
            raise EngineError(f"An adapter of {self.name} is in use.", advice="Wait for its requests to end.")
        self._check_alive()
        self._adapters.remove(number)
        await self._command(lambda done: DropAdapter(number, done))

    async def _command(self, make: Callable[[Callable[[ApplianceError | None], None]], Command]) -> None:
        """Give the worker a command that it answers, and wait for the answer."""
        answer: asyncio.Future[ApplianceError | None] = self._loop.create_future()
        self._worker.put(make(lambda error: post(self._loop, answer.set_result, error)))
        await asyncio.wait([answer, self.ended], return_when=asyncio.FIRST_COMPLETED)
        unloaded = EngineError(f"{self.name} was unloaded.", advice="Try again.", code="model_unloaded")
        error = answer.result() if answer.done() else self.ended.result() or unloaded
        if error is not None:
            raise error

    # Work

    @property
    def open_requests(self) -> int:
        """Return how many requests have not ended."""
        return len(self._open)

    @property
    def queue_full(self) -> bool:
        """Return True if one more request would be refused."""
        return self._open_choices >= self.config.sequences + self.config.queue_size

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        n: int = 1,
        priority: Priority = Priority.DEFAULT,
        tenant: str = "",
        weight: float = 1.0,
        deadline_s: float | None = None,
        pinned: bool = False,
        session: str = "",
        kept: bool = True,
        adapter: Adapter | None = None,
        constraints: Sequence[Constraint] = (),
        on_end: Callable[[], None] = lambda: None,
    ) -> LlamaGeneration:
        """Queue one request of a tenant, who has a share of the engine in proportion to his weight.

        It runs under `adapter`, which must be loaded, if one is given; `on_end` is called once it has ended. With
        `pinned` its state is kept for a day. What is kept can be forgotten by `session`; unless `kept`, nothing is.
        Where `sampling` has a grammar, `constraints` has one for each choice.

        Raises:
            InvalidRequestError: The prompt is empty, has unknown token ids, or leaves no room for an answer.
            OverloadedError: The queue is full.
            EngineError: The engine has ended.
        """
        check_prompt(self.name, prompt, self.context_length, self.vocabulary_size)
        self._check_alive()
        if adapter is not None and adapter.id not in self._adapters:
            raise EngineError(f"{adapter.name} was unloaded.", advice="Try again.", code="model_unloaded")
        if self.queue_full:
            raise OverloadedError(
                f"{self._open_choices} answers are being written or wait; "
                f"the model works on {self.config.sequences} at once and {self.config.queue_size} may wait.",
                advice="Try again later, or raise `queue_size`.",
                retry_after_s=self._retry_after(),
            )
        now = time.monotonic()
        space = "" if adapter is None else adapter.id
        generation = LlamaGeneration(
            model=self.name if adapter is None else adapter.name,
            prompt_tokens=len(prompt),
            choices=n,
            now=now,
            cancel=lambda: self._cancel(generation),
            adapter=space,
            on_end=on_end,
        )
        limit = self.context_length
        if sampling.max_tokens is not None:
            limit = min(limit, len(prompt) + sampling.max_tokens)
        tokens = array("i", prompt)
        deadline = None if deadline_s is None else now + deadline_s
        common = (tokens, sampling, priority, limit, now, tenant, weight, deadline, space, pinned, session, kept)
        choices = [Choice(generation, index, *common, each) for index, each in enumerate(constraints or [None] * n)]
        self._open.add(generation)
        self._meter.accepted(generation, None if adapter is None else adapter.metrics)
        if deadline_s is not None:
            generation.expire_at(self._loop.time() + deadline_s, deadline_s)
        self._worker.put(Submit(choices))
        self._show_load()
        return generation

    async def forget(self, sessions: Collection[str]) -> None:
        """Forget the states of sessions, whose text was deleted: in slots, in RAM and, when this returns, on disk.

        What is being written for them is written to its end, and forgotten then.

        Raises:
            EngineError: The engine has ended.
            StorageError: Not all files could be deleted.
        """
        self._check_alive()
        await self._command(lambda done: Forget(sessions, done))

    def tune(self, runtime: Runtime) -> None:
        """Run with other values from the next step on; streams go on undisturbed.

        Raises:
            InvalidRequestError: A value does not fit the context; nothing was changed.
        """
        least, most = self.config.sequences, self.config.batch_tokens
        if not least <= runtime.batch_tokens <= most:
            raise InvalidRequestError(
                f"A step of {self.name} can have {least} to {most} tokens, not {runtime.batch_tokens}.",
                advice=f"Each of its {least} sequences needs one; the setting `batch_tokens` allows for more.",
                param="batch_tokens",
                code="invalid_value",
            )
        self.runtime = runtime
        self._worker.put(runtime)

    # State

    @property
    def heartbeat_age_s(self) -> float:
        """Return the seconds since the thread last went round; infinite once it has ended."""
        return math.inf if self.ended.done() else time.monotonic() - self._worker.beat_at

    async def close(self) -> None:
        """End the thread and free the model; open requests end with an error.

        Raises:
            EngineError: The thread did not end in time; its memory is lost until the process ends.
        """
        self._worker.stop()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await asyncio.shield(self.ended)
        except TimeoutError as error:
            raise EngineError(f"The engine of {self.name} did not stop within {STOP_TIMEOUT_S:g} s.") from error
        finally:
            if self._lane is not None:
                await self._lane.close()

    def _check_alive(self) -> None:
        if self.ended.done():
            raise EngineError(f"The engine of {self.name} has ended.", code="engine_died")

    def _cancel(self, generation: LlamaGeneration) -> None:
        self._worker.put(Cancel(generation))
        generation.end(time.monotonic())
        self._forget(generation)

    def _forget(self, generation: LlamaGeneration) -> None:
        if generation in self._open:
            self._open.discard(generation)
            self._meter.request_ended(generation)
            self._show_load()

    @property
    def _open_choices(self) -> int:
        return sum(each.open_choices for each in self._open)

    def _retry_after(self) -> float:
        """Estimate the seconds until a place is free: a round of all that are ahead, at their recent duration."""
        rounds = self._open_choices / self.config.sequences
        return float(math.ceil(min(LONGEST_RETRY_AFTER_S, max(1.0, rounds * self._meter.mean_request_s))))

    def _show_load(self) -> None:
        running = sum(1 for each in self._open if each.admitted_at is not None)
        self._meter.load(running=running, waiting=len(self._open) - running)

    # Called by the worker's thread through the loop

    def _take_report(self, report: Report) -> None:
        for generation, event in report.events:
            self._meter.event(generation, event)
            generation.receive(event)
            if generation.ended:
                self._forget(generation)
            elif isinstance(event, Admitted):
                self._show_load()
        self._meter.speculation(report.draft_tokens, report.accepted_tokens)
        self._meter.cells(report.used_cells / self.config.cells)

    def _take_job(self, job: FileJob) -> None:
        if self._lane is not None:
            self._lane.put(job)
        elif isinstance(job, WriteState):
            self._worker.put(Written(job.head.id, succeeded=False))
        elif isinstance(job, EraseForGood):
            job.done(None)

    def _take_end(self, error: ApplianceError | None) -> None:
        reason = error or EngineError(f"{self.name} was unloaded.", advice="Try again.", code="model_unloaded")
        for generation in list(self._open):
            generation.fail(reason, time.monotonic())
            self._forget(generation)
        self.ended.set_result(error)
