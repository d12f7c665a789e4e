"""What a step of the engine costs, in process: all of it, and Python's part, by sequences, history and parked states.

Python's part is everything in the worker's thread but `llama_decode`: commands, plan, batch, sampling and the hand-over
to the event loop. It is shown to grow with the tokens of a step, and neither with history nor with what is parked.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

from appliance.bench.report import Progress
from appliance.core.errors import UnavailableError
from appliance.core.types import SamplingParams
from appliance.engine.llama.config import EngineConfig
from appliance.engine.llama.engine import LlamaEngine
from appliance.engine.llama.generation import LlamaGeneration
from appliance.engine.llama.native import llama
from appliance.observe.metrics import Metrics
from tests.benchmarks.results import Result, number
from tests.deltas import deltas_of

NAME = "steps"
ANSWER = 64
PARKED_TOKENS = 20
PARKED_AT_ONCE = 32
TIMEOUT_S = 1800.0
HEADINGS = ["Sequences", "History", "Parked", "Steps", "Step ms", "Python ms", "Python %", "Python µs a token"]
_COUNTED = (
    "The median of the engine's steps in which every sequence decodes one token, after a prompt of `History` tokens, "
    "with so many parked states. A step is plan, batch, llama_decode, sampling and hand-over to the event loop; "
    "Python is the CPU time of all of it but llama_decode. Greedy, without prompt lookup, in this process, no server."
)


@dataclass(frozen=True, slots=True)
class Case:
    """A state of the engine to measure in."""

    sequences: int
    history: int
    parked: int


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one step, the CPU seconds of Python in it, and the tokens of its batch."""

    seconds: float
    python: float
    tokens: int


CASES = [
    *(Case(sequences, 100, 0) for sequences in (1, 2, 4, 8, 16, 32, 64)),
    *(Case(1, history, 0) for history in (100, 1000, 4000, 8000)),
    *(Case(8, 100, parked) for parked in (0, 100, 1000)),
]
QUICK_CASES = [Case(1, 100, 0), Case(8, 100, 0), Case(1, 1000, 0), Case(8, 100, 40)]


async def measure(path: Path, cases: Sequence[Case], *, threads: int, cells: int, progress: Progress) -> Result:
    """Measure every case, each on an engine of its own.

    Raises:
        ApplianceError: The engine failed.
    """
    rows = []
    for case in dict.fromkeys(cases):
        progress(f"{NAME}: {case.sequences} sequences, {case.history} tokens of history, {case.parked} parked")
        rows.append(_row(case, await measure_case(path, case, threads=threads, cells=cells)))
    return Result(name=NAME, counted=_COUNTED, headings=HEADINGS, rows=rows)


async def measure_case(path: Path, case: Case, *, threads: int, cells: int) -> list[StepCost]:
    """Return the steps in which all sequences decode.

    Raises:
        UnavailableError: There were none, or the states are not parked.
    """
    engine = await LlamaEngine.load(NAME, path, _config(case, threads, cells), Metrics().for_model(NAME))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await _park(engine, case.parked)
            with _watching(engine) as steps:
                await _generate(engine, case.sequences, case.history, ANSWER, seed=1)
    finally:
        await engine.close()
    # While prompts are read, batches are as large as they may be; so these are those in which everyone decodes.
    costs = [each for each in steps if each.tokens == case.sequences]
    if not costs:
        raise UnavailableError(f"No step had a token of each of {case.sequences} sequences.")
    return costs


def _row(case: Case, costs: Sequence[StepCost]) -> list[str]:
    step, python = median(each.seconds for each in costs), median(each.python for each in costs)
    shown = [
        number(1e3 * step),
        number(1e3 * python),
        number(100 * python / step),
        number(1e6 * python / case.sequences),
    ]
    return [str(case.sequences), f"{case.history:,}", f"{case.parked:,}", str(len(costs)), *shown]


def _config(case: Case, threads: int, cells: int) -> EngineConfig:
    config = EngineConfig(
        cells=cells,
        sequences=case.sequences,
        batch_tokens=512,
        threads=threads,
        gpu_layers=-1,
        target_inter_token_latency_s=60.0,  # prompts are read at once, so that all are soon decoding
        queue_size=max(case.sequences, PARKED_AT_ONCE),
        parking_ram_bytes=2 * 1024**3 if case.parked else 0,
    )
    changes: dict[str, Any] = {"speculation": "off"} if "speculation" in {each.name for each in fields(config)} else {}
    return replace(config, **changes)


async def _park(engine: LlamaEngine, count: int) -> None:
    """Let so many short conversations happen, whose states are parked when others need their slots."""
    done = 0
    while done < count:
        group = min(PARKED_AT_ONCE, count - done)
        await _generate(engine, group, PARKED_TOKENS, 2, seed=2 + done)
        done += group
    parked = len(engine._worker.runner.keeper.states)
    if parked < count - engine.config.slots:
        raise UnavailableError(f"Of {count} states only {parked} are parked.")


async def _generate(engine: LlamaEngine, sequences: int, history: int, tokens: int, *, seed: int) -> None:
    chance = random.Random(seed)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    highest = engine.vocabulary_size - 1
    prompts = [[chance.randint(highest // 2, highest) for _ in range(history)] for _ in range(sequences)]
    async with asyncio.TaskGroup() as tasks:
        for number_, prompt in enumerate(prompts):
            tasks.create_task(_read(engine.submit(prompt, sampling)), name=f"sequence {number_}")


async def _read(generation: LlamaGeneration) -> None:
    async for _ in deltas_of(generation):
        pass


@contextmanager
def _watching(engine: LlamaEngine) -> Iterator[list[StepCost]]:
    """Collect the cost of every step; its tokens are those of its last batch."""
    steps: list[StepCost] = []
    native: list[float] = []
    tokens: list[int] = []
    step, decode = engine._worker.runner.step, llama.llama_decode

    def timed_decode(context: Any, batch: Any) -> Any:
        began = time.thread_time()
        code = decode(context, batch)
        native.append(time.thread_time() - began)
        tokens.append(batch.n_tokens)
        return code

    def timed_step() -> None:
        native.clear()
        tokens.clear()
        began, cpu = time.perf_counter(), time.thread_time()
        step()
        python = time.thread_time() - cpu - sum(native)
        steps.append(StepCost(time.perf_counter() - began, python, sum(tokens)))

    with _replaced(engine._worker.runner, "step", timed_step), _replaced(llama, "llama_decode", timed_decode):
        yield steps


@contextmanager
def _replaced(owner: object, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)
