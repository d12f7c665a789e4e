"""The process that tries a version before anyone depends on it: `python -m appliance.serving.self_test_child`.

It loads the version as the server would, and answers golden inputs. Native code may do anything meanwhile: crash,
hang, or take all memory. So it is a process that may be killed, at low priority, bounded in memory and time, and first
in line should the box run out of memory; it ends some seconds after its parent would have ended it.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import uvloop

from appliance.core.errors import ApplianceError, EngineError, InvalidRequestError, ModelFileError
from appliance.core.exits import leave_memory_to_the_system
from appliance.core.releases import Criteria, GoldenInput
from appliance.core.settings import Settings
from appliance.core.types import SamplingParams
from appliance.core.wishes import SelfTestReport
from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.llama_embedding.engine import LlamaEmbedder
from appliance.engine.onnx.encoder import OnnxEncoder
from appliance.engine.onnx.golden import cosine_distance, golden_arrays, largest_difference
from appliance.observe.metrics import Metrics
from appliance.observe.resources import physical_cores
from appliance.registry.known import RegisteredModel
from appliance.registry.versions import Registry, open_registry
from appliance.serving.engine_config import embedding_config
from appliance.serving.generate import prompt_tokens
from appliance.serving.purposes import ONNX
from appliance.serving.route import LoadedModel
from appliance.serving.self_test_protocol import Order, decode_order, encode, failed_test
from appliance.serving.tensor_loader import TEXT_TASKS, TensorModelLoader
from appliance.serving.text_loader import TextModelLoader
from appliance.store.database import Database

NICENESS = 10
GRACE_S = 10.0
"""How much longer than its parent allows this process lives."""
SPEED_TOKENS = 48
SPEED_INPUTS = 16
ANY_PROMPT = "The quick brown fox jumps over the lazy dog."
_DATA_MARGIN_BYTES = 256 * 2**20


class WrongAnswerError(EngineError):
    """A golden input came to something else than was expected."""

    default_code = "wrong_answer"


class Trial:
    """One version in this process."""

    def __init__(self, settings: Settings, registry: Registry, registered: RegisteredModel) -> None:
        """Nothing is loaded yet. What is parked or compiled for the server is left alone."""
        self._settings = replace(settings, parking_ram_bytes=0, parking_disk_bytes=0)
        self._registry = registry
        self._registered = registered
        self._metrics = Metrics()
        self._cpu = CpuBudget(physical_cores())

    async def run(self, criteria: Criteria) -> float:
        """Load it, answer the golden inputs, and return its tokens or inputs a second.

        Raises:
            ApplianceError: It cannot be loaded or evaluated, or answers wrongly.
        """
        if self._registered.kind == ONNX:
            return await self._run_onnx(criteria.golden)
        if self._registered.task == "embedding":
            return await self._run_embedder(criteria.golden)
        return await self._run_text(criteria.golden)

    async def _run_text(self, golden: Sequence[GoldenInput]) -> float:
        model = await TextModelLoader(self._settings, self._registry, self._metrics, self._cpu).load(self._registered)
        try:
            for each in golden:
                text = await self._write(model, each.prompt, each.max_tokens)
                if not text.startswith(each.expected):
                    raise WrongAnswerError(
                        f"After {each.prompt!r:.100} came {text!r:.200}, and {each.expected!r:.200} was expected."
                    )
            began, cpu_began = time.monotonic(), time.process_time()
            await self._write(model, ANY_PROMPT, SPEED_TOKENS, ignore_eos=True)
            return self._pace(SPEED_TOKENS, time.monotonic() - began, time.process_time() - cpu_began)
        finally:
            if model.renderer is not None:
                await model.renderer.close()
            await model.engine.close()
            model.hold.close()

    async def _write(self, model: LoadedModel, prompt: str, most: int, *, ignore_eos: bool = False) -> str:
        tokens = await prompt_tokens(model, prompt)
        sampling = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=ignore_eos)
        generation = model.engine.submit(tokens, sampling)
        told = asyncio.Event()
        generation.notify(told.set)
        text = ""
        while True:
            ended = generation.ended
            text += "".join(delta.text for delta in generation.take())
            if ended:
                return text
            await told.wait()
            told.clear()

    async def _run_embedder(self, golden: Sequence[GoldenInput]) -> float:
        registered = self._registered
        with self._registry.hold(registered):
            engine = await LlamaEmbedder.load(
                registered.full_name,
                registered.files[0].path,
                embedding_config(self._settings, registered),
                self._metrics.for_embedder(registered.full_name),
                gpu_layers=self._settings.gpu_layers,
                shared=None,
                cpu=self._cpu,
            )
            try:
                return await self._embed(engine, golden)
            finally:
                await engine.close()

    async def _run_onnx(self, golden: Sequence[GoldenInput]) -> float:
        model = await TensorModelLoader(self._settings, self._registry, self._metrics, self._cpu).load(self._registered)
        try:
            for each in golden:
                if each.tensors:
                    outputs = await model.engine.infer(golden_arrays(model.engine.signature, each.tensors))
                    _check_difference(each, largest_difference(outputs, each.outputs))
            if self._registered.task not in TEXT_TASKS[:1]:
                return 0.0
            return await self._embed(model.encoder, [each for each in golden if not each.tensors])
        finally:
            await model.engine.close()
            model.hold.close()

    async def _embed(self, engine: LlamaEmbedder | OnnxEncoder, golden: Sequence[GoldenInput]) -> float:
        for each in golden:
            tokens, _ = await engine.tokenize([each.prompt], truncate=True)
            [vector] = await engine.embed(tokens)
            for expected in each.outputs.values():
                _check_difference(each, cosine_distance(vector, expected))
        tokens, _ = await engine.tokenize([ANY_PROMPT] * SPEED_INPUTS, truncate=True)
        began, cpu_began = time.monotonic(), time.process_time()
        await engine.embed(tokens)
        return self._pace(SPEED_INPUTS, time.monotonic() - began, time.process_time() - cpu_began)

    def _pace(self, count: int, wall_s: float, cpu_s: float) -> float:
        """Return how many a second: as the clock says, or as it would be with the cores to itself, which serve now."""
        seconds = wall_s if self._settings.gpu_layers else min(wall_s, cpu_s / physical_cores())
        return count / max(seconds, 1e-6)


def _check_difference(golden: GoldenInput, difference: float) -> None:
    if difference > golden.tolerance:
        raise WrongAnswerError(
            f"What came of a golden input differs by {difference:.3g}, and at most {golden.tolerance:g} is allowed."
        )


async def try_version(order: Order) -> SelfTestReport:
    """Return how a version does."""
    with closing(Database(order.settings.database_path, read_only=True)) as database:
        registry = open_registry(order.settings, database)
        try:
            pace = await Trial(order.settings, registry, registry.resolve(order.full_name)).run(order.criteria)
        except (MemoryError, ApplianceError) as error:
            return failed_test(_code(error), str(error), memory=peak_memory())
    report = SelfTestReport(passed=True, tokens_per_second=pace, memory=peak_memory())
    least, most = order.criteria.least_tokens_per_second, order.criteria.most_memory
    if pace < least and pace:
        detail = f"It makes {pace:.1f} a second, and at least {least:g} are asked for."
        return failed_test("too_slow", detail, memory=report.memory, pace=pace)
    if most and report.memory > most:
        detail = f"It takes {report.memory / 2**20:.0f} MiB, and at most {most / 2**20:.0f} are allowed."
        return failed_test("out_of_memory", detail, memory=report.memory, pace=pace)
    return report


def _code(error: BaseException) -> str:
    if isinstance(error, MemoryError) or "memory" in str(error).lower():
        return "out_of_memory"
    if isinstance(error, InvalidRequestError) and not isinstance(error, ModelFileError):
        return "bad_golden_input"
    return error.code if isinstance(error, WrongAnswerError) else "not_loadable"


def peak_memory() -> int:
    """Return the bytes of this program at its largest.

    Not `ru_maxrss`: Linux hands that of the parent on to a program that it starts, however small that is.
    """
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    """Return one of the sizes that the kernel tells of this process; see proc_pid_status(5)."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{name}:")), 0)


def restrict_process(order: Order) -> None:
    """Bound this process, for good, in memory and time, and put it behind all others."""
    os.nice(NICENESS)
    signal.setitimer(signal.ITIMER_REAL, order.criteria.test_timeout_s + GRACE_S)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    data = _status_bytes("VmData") + order.most_memory + _DATA_MARGIN_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def main() -> None:
    """Take the order from standard input, and write the report to standard output."""
    leave_memory_to_the_system()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # native code may print what it likes
    order = decode_order(sys.stdin.buffer.read())
    restrict_process(order)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(try_version(order))
    with os.fdopen(answer, "wb") as stream:
        stream.write(encode(report))


if __name__ == "__main__":
    main()
