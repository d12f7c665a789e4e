"""The thread of one model, and how to reach it.

It takes commands from one queue, and answers with one call to the event loop a step. Its heartbeat is a number that it
raises whenever it goes round; nobody ever waits for it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from appliance.core.errors import ApplianceError, EngineError
from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.llama.commands import Command, Forget, Report, Submit
from appliance.engine.llama.config import EngineConfig
from appliance.engine.llama.generation import Failed
from appliance.engine.llama.keeper import FileJob
from appliance.engine.llama.lora import DropAdapter, LoadAdapter
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.native import computes_on_gpu
from appliance.engine.llama.runner import Runner

LOGGER = logging.getLogger("appliance.engine")
IDLE_BEAT_S = 1.0
"""How often an idle worker goes round, for its heartbeat."""


class Worker:
    """Runs one model in its own thread until `stop`.

    Attributes:
        runner: The model at work; set before `on_ready` is called.
        beat_at: Monotonic time of the last heartbeat.
    """

    runner: Runner

    def __init__(
        self,
        path: Path,
        config: EngineConfig,
        *,
        on_ready: Callable[[LlamaModel], None],
        on_report: Callable[[Report], None],
        on_end: Callable[[ApplianceError | None], None],
        on_job: Callable[[FileJob], None],
        cpu: CpuBudget | None = None,
    ) -> None:
        """Prepare a thread for the model file; the callbacks are called in that thread."""
        self._cpu = None if computes_on_gpu(config.gpu_layers) else cpu
        self._path = path
        self._config = config
        self._on_ready, self._on_report, self._on_end, self._on_job = on_ready, on_report, on_end, on_job
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
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
        runner: Runner | None = None
        try:
            runner = self.runner = Runner(
                self._path, self._config, on_report=self._on_report, on_job=self._on_job, cpu=self._cpu
            )
            self._on_ready(runner.model)
            while self._take_commands(runner):
                runner.step()
            runner.park_everything()
        except ApplianceError as failure:
            error = failure
        except Exception as failure:  # whatever killed the thread: the process must hear of it
            LOGGER.exception("the engine thread of %s died", self._path.name)
            error = EngineError(f"The engine thread died: {failure}.", code="engine_died")
        finally:
            self._end_everyone(runner, error)
            if runner is not None:
                runner.close()
            self._on_end(error)

    def _take_commands(self, runner: Runner) -> bool:
        """Carry out what waits; when there is nothing else to do, wait for it. False when the worker is to stop."""
        idle, waits = runner.idle, runner.idle or runner.blocked
        while True:
            self.beat_at = time.monotonic()
            try:
                command = self._inbox.get(timeout=IDLE_BEAT_S) if waits else self._inbox.get_nowait()
            except queue.Empty:
                if idle:
                    runner.rest()
                    continue
                return True
            if command is None:
                return False
            runner.carry_out(command)
            idle = waits = False

    def _end_everyone(self, runner: Runner | None, error: ApplianceError | None) -> None:
        reason = error or EngineError(
            "The model was unloaded.", advice="Send the request again.", code="model_unloaded"
        )
        if runner is not None:
            runner.end(reason)
        while not self._inbox.empty():
            match self._inbox.get():
                case Submit(choices):
                    failed = [(each.generation, Failed(reason, time.monotonic())) for each in choices]
                    self._on_report(Report(failed, 0, 0))
                case LoadAdapter(_, done) | DropAdapter(_, done) | Forget(_, done):
                    done(reason)
