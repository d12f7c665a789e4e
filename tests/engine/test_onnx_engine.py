"""The ONNX engine on real onnxruntime with tiny models: batches, limits, failures, neighbours and its end.

Where a test needs the engine to be busy it takes the CPU budget itself: the thread then stands before its next batch.
"""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from appliance.core.errors import (
    ApplianceError,
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    ModelFileError,
    OverloadedError,
    UnavailableError,
)
from appliance.core.types import Priority, SamplingParams
from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.llama.engine import LlamaEngine
from appliance.engine.onnx import engine as engine_module
from appliance.engine.onnx.config import SessionConfig
from appliance.engine.onnx.engine import OnnxEngine
from appliance.engine.onnx.evaluation import Job
from appliance.engine.onnx.work import Arrays, Item
from appliance.engine.onnx.worker import Submit
from appliance.observe.metrics import Metrics
from tests import tiny_onnx
from tests.engine.conftest import CONFIG as LLAMA_CONFIG
from tests.engine.conftest import DEADLINE_S, EngineUnderTest
from tests.engine.embedders import embedding

pytestmark = pytest.mark.anyio

Floats = npt.NDArray[np.float32]


class Subject:
    """An engine with shorthands."""

    def __init__(self, engine: OnnxEngine, metrics: Metrics, cpu: CpuBudget) -> None:
        self.engine = engine
        self.metrics = metrics
        self.cpu = cpu

    async def ask(self, value: npt.ArrayLike, *, name: str = "x", dtype: type = np.float32, **how: Any) -> Any:
        async with asyncio.timeout(DEADLINE_S):
            outputs = await self.engine.infer({name: np.array(value, dtype)}, **how)
        return next(iter(outputs.values())).tolist()

    async def index(self, *numbers: int, **how: Any) -> Any:
        """Ask `fallible`, which fails on numbers past its table."""
        return await self.ask([list(numbers)], name="index", dtype=np.int64, **how)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not true():  # noqa: ASYNC110  (what is waited for happens in another thread, without an event)
                await asyncio.sleep(0)

    @asynccontextmanager
    async def busy(self, tasks: asyncio.TaskGroup, first: Any) -> AsyncIterator[asyncio.Task[Any]]:
        """Have the thread stand before the batch of a first request, so that what follows waits together."""
        with self.cpu.turn(1):
            task = tasks.create_task(first)
            await self.until(lambda: self.cpu.waiting == 1)
            yield task

    def told(self, series: str) -> float:
        line = next(each for each in self.metrics.render().decode().splitlines() if each.startswith(series))
        return float(line.rpartition(" ")[2])


@asynccontextmanager
async def running(path: Path, cpu: CpuBudget | None = None, **changes: Any) -> AsyncIterator[Subject]:
    metrics, cpu = Metrics(), cpu or CpuBudget(1)
    series = metrics.for_tensors("tiny:1")
    async with asyncio.timeout(DEADLINE_S):
        engine = await OnnxEngine.load("tiny:1", path, SessionConfig(**changes), series, cpu)
    try:
        yield Subject(engine, metrics, cpu)
    finally:
        await engine.close()
        assert engine.open_requests == 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def rows(*values: float) -> list[list[float]]:
    return [[value] for value in values]


# Answers


async def test_a_request_is_answered_as_onnxruntime_answers(path: Path) -> None:
    import onnxruntime

    given = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    async with running(tiny_onnx.tabular(path)) as subject:
        answer = await subject.engine.infer({"features": given})
    raw = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"features": given})
    np.testing.assert_array_equal(answer["probabilities"], raw[0])


async def test_an_engine_at_rest_gives_memory_back(path: Path) -> None:
    async with running(tiny_onnx.identity(path, "FP32")) as subject:
        await subject.ask([[1.0, 2.0, 3.0]])
        await subject.until(lambda: not subject.engine._worker.session.can_shrink)
        assert await subject.ask([[1.0, 2.0, 3.0]]) == [[1.0, 2.0, 3.0]]


async def test_outputs_come_as_they_are_wanted(path: Path) -> None:
    async with running(tiny_onnx.two_inputs(path)) as subject:
        inputs = {"a": np.full((1, 2), 3, np.float32), "b": np.full((1, 2), 1, np.float32)}
        everything = await subject.engine.infer(inputs)
        assert {name: array.tolist() for name, array in everything.items()} == {
            "sum": [[4.0, 4.0]],
            "difference": [[2.0, 2.0]],
        }
        assert list(await subject.engine.infer(inputs, ("difference", "sum"))) == ["difference", "sum"]
        assert list(await subject.engine.infer(inputs, ("difference",))) == ["difference"]


async def test_requests_that_wait_together_share_a_batch_and_each_gets_its_own_rows(path: Path) -> None:
    async with running(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        async with subject.busy(tasks, subject.ask(rows(0))):
            others = [tasks.create_task(subject.ask(rows(*range(1, size + 1)))) for size in (1, 3, 2)]
            await subject.until(lambda: subject.engine.open_requests == 4)
        assert [await each for each in others] == [rows(1), rows(1, 2, 3), rows(1, 2)]
        assert subject.engine.statistics.batches.keys() == {1, 6}
        assert subject.engine.statistics.execution_count == 2
        assert subject.engine.statistics.inference_count == 7
        assert subject.told('appliance_batch_rows_sum{model="tiny:1"}') == 7
        assert subject.told('appliance_request_success_total{finish_reason="stop",model="tiny:1"}') == 4


async def test_different_shapes_do_not_mix_and_no_rows_are_an_answer_too(path: Path) -> None:
    async with running(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        async with subject.busy(tasks, subject.ask(rows(0))):
            wide = tasks.create_task(subject.ask([[1, 2]]))
            narrow = tasks.create_task(subject.ask(rows(3)))
            none = tasks.create_task(subject.engine.infer({"x": np.zeros((0, 3), np.float32)}))
        assert (await wide, await narrow) == ([[1, 2]], rows(3))
        assert (await none)["y"].shape == (0, 3)
        assert subject.engine.statistics.execution_count == 4


async def test_large_rows_close_a_batch_before_their_number_does(path: Path) -> None:
    half_a_megabyte = np.zeros((1, 2**17), np.float32)
    async with running(tiny_onnx.identity(path)) as subject:
        async with asyncio.TaskGroup() as tasks, subject.busy(tasks, subject.ask(rows(0))):
            for _ in range(4):
                tasks.create_task(subject.engine.infer({"x": half_a_megabyte}))
            await subject.until(lambda: subject.engine.open_requests == 5)
        assert subject.engine.statistics.batches.keys() == {1, 2}


@pytest.mark.parametrize("make", [tiny_onnx.fixed, lambda path: tiny_onnx.identity(path, shape=(None, "b", "b"))])
async def test_awkward_shapes_run_alone(path: Path, make: Callable[[Path], Path]) -> None:
    async with running(tiny_onnx.fixed(path)) as subject, asyncio.TaskGroup() as tasks:
        async with subject.busy(tasks, subject.ask([[0] * 4])):
            others = [tasks.create_task(subject.ask([[number] * 4])) for number in range(3)]
        assert [await each for each in others] == [[[2 * number] * 4] for number in range(3)]
        assert subject.engine.statistics.execution_count == 4


async def test_a_model_with_state_and_a_scalar_runs_alone(path: Path) -> None:
    async with running(tiny_onnx.stateful(path)) as subject:
        inputs = {"x": np.ones((1, 4), np.float32), "state": np.ones((2, 1, 4), np.float32), "rate": np.array(16)}
        outputs = await subject.engine.infer(inputs)
        assert outputs["y"].tolist() == [[16.0] * 4]
        assert outputs["state_out"].shape == (2, 1, 4)


async def test_a_single_request_is_not_copied_and_one_of_many_does_not_hold_the_batch(path: Path) -> None:
    class Watched(np.ndarray[Any, Any]):
        """An array that can be watched; a slice keeps it alive."""

    async with running(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        seen: list[Any] = []
        session = subject.engine._worker.session
        run = session.run

        def watching(inputs: Arrays, wanted: Collection[str]) -> Mapping[str, Any]:
            outputs = {name: array.view(Watched) for name, array in run(inputs, wanted).items()}
            seen.append((inputs["x"], weakref.ref(outputs["y"])))
            return outputs

        session.run = watching  # type: ignore[assignment]
        alone = np.ones((1, 1), np.float32)
        await subject.engine.infer({"x": alone})
        assert seen.pop()[0] is alone
        async with subject.busy(tasks, subject.ask(rows(0))):
            others = [tasks.create_task(subject.engine.infer({"x": alone})) for _ in range(2)]
            await subject.until(lambda: subject.engine.open_requests == 3)
        answers = [await each for each in others]
        gc.collect()
        assert seen[-1][0].shape == (2, 1)
        assert seen[-1][1]() is None
        assert [each["y"].tolist() for each in answers] == [[[1.0]], [[1.0]]]


@pytest.mark.parametrize("given", [{}, {"x": np.zeros(3, np.float32)}, {"y": np.zeros((1, 1), np.float32)}])
async def test_tensors_that_do_not_fit_are_refused_and_nothing_is_queued(path: Path, given: dict[str, Any]) -> None:
    async with running(tiny_onnx.identity(path)) as subject:
        with pytest.raises(InvalidRequestError):
            await subject.engine.infer(given)
        assert subject.engine.statistics.fail.count == 0
        assert subject.engine.open_requests == 0


async def test_it_says_what_it_is(path: Path) -> None:
    async with running(tiny_onnx.tabular(path), threads=2) as subject:
        engine = subject.engine
        assert engine.signature.batched
        assert engine.providers == ("CPUExecutionProvider",)
        expected = {"execution_providers": "CPUExecutionProvider", "threads": "2", "lanes": "1"}
        assert dict(engine.properties) == expected
        assert (engine.statistics.name, engine.statistics.version) == ("tiny", "1")
        assert 0 <= engine.heartbeat_age_s < DEADLINE_S
        assert (engine.open_requests, engine.queue_full, engine.circuit_open) == (0, False, False)


# Jobs of many items


class Doubling:
    """A collation of its own: numbers, padded to the longest."""

    def collate(self, items: Sequence[Item]) -> Arrays:
        if any(each.payload == "bad" for each in items):
            raise EngineError("It cannot be joined.")
        if any(each.payload == "huge" for each in items):
            raise MemoryError
        longest = max(each.length for each in items)
        return {"x": np.array([[each.payload] * longest for each in items], np.float32)}

    def outputs(self, _: Sequence[Item], /) -> Collection[str]:
        return ()

    def split(self, outputs: Arrays, items: Sequence[Item]) -> Sequence[float]:
        return [float(row[0]) for row in outputs["y"]]


def numbers(*given: float | str, length: int = 1) -> list[Item]:
    return [Item(each, length=length) for each in given]


async def test_a_job_of_many_items_is_answered_in_order(path: Path) -> None:
    async with running(tiny_onnx.identity(path), batch_rows=8) as subject:
        items = [Item(float(number), length=1 + number * 37 % 90) for number in range(100)]
        assert await subject.engine.submit(items, Doubling()) == [float(number) for number in range(100)]
        assert subject.engine.statistics.success.count == 1
        assert subject.engine.statistics.execution_count >= 13


async def test_one_bad_item_fails_its_own_request_alone(path: Path) -> None:
    async with running(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        collation = Doubling()
        async with subject.busy(tasks, subject.ask(rows(0))):
            good = [tasks.create_task(subject.engine.submit(numbers(n, n + 1), collation)) for n in (1, 3)]
            bad = tasks.create_task(failing(subject.engine.submit(numbers(5, "bad", 6), collation)))
            huge = tasks.create_task(failing(subject.engine.submit(numbers("huge"), collation)))
        assert [await each for each in good] == [[1, 2], [3, 4]]
        assert str(await bad) == "It cannot be joined."
        assert (await huge).code == "not_enough_memory"


async def failing(work: Any) -> ApplianceError:
    """Return the error in which it ends."""
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(ApplianceError) as caught:
            await work
    return caught.value


async def test_a_large_job_does_not_hold_up_a_small_one(path: Path) -> None:
    async with running(tiny_onnx.identity(path), batch_rows=4) as subject, asyncio.TaskGroup() as tasks:
        collation = Doubling()
        async with subject.busy(tasks, subject.ask(rows(0))):
            large = tasks.create_task(subject.engine.submit(numbers(*[1.0] * 2000), collation))
            await subject.until(lambda: subject.engine.open_requests == 2)
            small = tasks.create_task(subject.engine.submit(numbers(2.0), collation))
            await subject.until(lambda: subject.engine.open_requests == 3)
        executions = []
        small.add_done_callback(lambda _: executions.append(subject.engine.statistics.execution_count))
        assert await small == [2.0]
        await large
        assert executions[0] < 500


async def test_no_items_are_no_work(path: Path) -> None:
    async with running(tiny_onnx.identity(path)) as subject:
        assert await subject.engine.submit([], Doubling()) == []


async def test_outputs_that_a_collation_cannot_read_fail_the_request_and_not_the_thread(
    path: Path, caplog: Any
) -> None:
    class Misled(Doubling):
        def split(self, outputs: Arrays, items: Sequence[Item]) -> Sequence[float]:
            return [float(outputs["pooled"][0]) for _ in items]

    async with running(tiny_onnx.identity(path)) as subject:
        error = await failing(subject.engine.submit(numbers(1.0), Misled()))
        assert (type(error), error.code) == (EngineError, "bad_output")
        assert await subject.ask(rows(1)) == rows(1)
    assert "pooled" in caplog.text


async def test_a_view_that_begins_anywhere_and_cannot_be_written_is_read_rightly(path: Path) -> None:
    body = b"\x00" + np.arange(6, dtype=np.float32).tobytes()
    async with running(tiny_onnx.identity(path)) as subject:
        odd = np.frombuffer(body, np.float32, offset=1).reshape(2, 3)
        assert not odd.flags.aligned
        assert (await subject.engine.infer({"x": odd}))["y"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert (await subject.engine.infer({"x": odd.T}))["y"].tolist() == [[0, 3], [1, 4], [2, 5]]


# Leaving, deadlines, overload


async def test_a_cancelled_request_does_not_disturb_its_batch(path: Path) -> None:
    async with running(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        async with subject.busy(tasks, subject.ask(rows(0))) as first:
            second, third = (tasks.create_task(subject.ask(rows(number))) for number in (1, 2))
            await subject.until(lambda: subject.engine.open_requests == 3)
            second.cancel()
            first.cancel()  # whose batch is made already
            await subject.until(lambda: subject.engine.open_requests == 1)
        assert await third == rows(2)
        assert subject.engine.statistics.cancel.count == 2
        assert 2 not in subject.engine.statistics.batches
        assert subject.engine.statistics.success.count == 1
        await subject.until(lambda: not subject.engine._worker._jobs)


async def test_a_request_that_takes_too_long_ends_at_its_deadline_while_others_go_on(path: Path) -> None:
    async with running(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        async with subject.busy(tasks, subject.ask(rows(0))):
            patient = tasks.create_task(subject.ask(rows(1), deadline_s=DEADLINE_S))
            error = await failing(subject.ask(rows(2), deadline_s=0.01))
            assert isinstance(error, DeadlineExceededError)
            assert subject.engine.open_requests == 2
        assert await patient == rows(1)
        assert subject.engine.statistics.fail.count == 1
        assert subject.engine.statistics.inference_count == 2


async def test_what_expired_in_the_queue_is_not_evaluated_even_before_the_loop_knows(path: Path) -> None:
    async with running(tiny_onnx.identity(path)) as subject:
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        late = Job(numbers(1.0), Doubling(), Priority.DEFAULT, 0.0, 1.0, answer)  # without a timer on the loop
        subject.engine._open.add(late)
        subject.engine._worker.put(Submit(late))
        assert isinstance(await failing(answer), DeadlineExceededError)
        assert subject.engine.statistics.inference_count == 0


async def test_one_more_than_may_wait_is_refused_and_told_when_to_come_back(path: Path) -> None:
    async with running(tiny_onnx.identity(path), queue_size=2) as subject, asyncio.TaskGroup() as tasks:
        async with subject.busy(tasks, subject.ask(rows(0))):
            others = [tasks.create_task(subject.ask(rows(number))) for number in (1, 2)]
            await subject.until(lambda: subject.engine.queue_full)
            error = await failing(subject.ask(rows(3)))
            assert isinstance(error, OverloadedError)
            assert error.retry_after_s is not None
            assert 1 <= error.retry_after_s <= 60
            assert subject.told('appliance_num_requests_waiting{model="tiny:1"}') == 2
        assert [await each for each in others] == [rows(1), rows(2)]
        assert not subject.engine.queue_full


async def test_who_has_priority_is_first(path: Path) -> None:
    async with running(tiny_onnx.identity(path), batch_rows=1) as subject, asyncio.TaskGroup() as tasks:
        order: list[Priority] = []

        def noted(priority: Priority, _: object) -> None:
            order.append(priority)

        async with subject.busy(tasks, subject.ask(rows(0))):
            for priority in (Priority.FLEX, Priority.DEFAULT, Priority.PRIORITY):
                task = tasks.create_task(subject.ask(rows(1), priority=priority))
                task.add_done_callback(partial(noted, priority))
            await subject.until(lambda: subject.engine.open_requests == 4)
        await subject.until(lambda: len(order) == 3)
        assert order == [Priority.PRIORITY, Priority.DEFAULT, Priority.FLEX]


# Failures


async def test_one_bad_request_does_not_fail_its_batch(path: Path) -> None:
    async with running(tiny_onnx.fallible(path)) as subject, asyncio.TaskGroup() as tasks:
        async with subject.busy(tasks, subject.index(0)):
            good = [tasks.create_task(subject.index(number)) for number in (1, 3)]
            bad = tasks.create_task(failing(subject.index(99)))
            await subject.until(lambda: subject.engine.open_requests == 4)
        assert [await each for each in good] == [[[[2.0, 3.0]]], [[[6.0, 7.0]]]]
        error = await bad
        assert isinstance(error, EngineError)
        assert error.code == "model_failed"
        assert "onnxruntime" not in error.message.lower()
        assert not subject.engine.circuit_open


async def test_a_model_that_fails_in_a_row_is_left_alone_for_a_while_and_then_tried_once(path: Path) -> None:
    async with running(tiny_onnx.fallible(path), circuit_failures=2, circuit_open_s=0.05) as subject:
        for _ in range(2):
            assert isinstance(await failing(subject.index(99)), EngineError)
        assert subject.engine.circuit_open
        error = await failing(subject.index(0))
        assert isinstance(error, UnavailableError)
        assert (error.code, error.retry_after_s) == ("circuit_open", 1.0)
        await subject.until(lambda: not subject.engine.circuit_open)
        async with asyncio.TaskGroup() as tasks:
            async with subject.busy(tasks, subject.index(1)) as trial:
                assert subject.engine.circuit_open
                assert isinstance(await failing(subject.index(0)), UnavailableError)
            assert await trial == [[[2.0, 3.0]]]
        assert await subject.index(0) == [[[0.0, 1.0]]]


async def test_a_trial_whose_caller_leaves_makes_room_for_another(path: Path) -> None:
    async with running(tiny_onnx.fallible(path), circuit_failures=1, circuit_open_s=0.01) as subject:
        await failing(subject.index(99))
        await subject.until(lambda: not subject.engine.circuit_open)
        async with asyncio.TaskGroup() as tasks, subject.busy(tasks, subject.index(1)) as trial:
            trial.cancel()
            await subject.until(lambda: not subject.engine.circuit_open)
        assert await subject.index(1) == [[[2.0, 3.0]]]


async def test_bad_strings_are_not_the_models_failure(path: Path) -> None:
    async with running(tiny_onnx.strings(path), circuit_failures=1) as subject:
        error = await failing(subject.engine.infer({"text": np.array([[b"\xff"]], np.object_)}))
        assert isinstance(error, InvalidRequestError)
        assert not subject.engine.circuit_open


async def test_an_output_without_the_batchs_rows_fails_nobody_else(path: Path) -> None:
    from onnx import helper

    node = helper.make_node("Compress", ["x", "first"], ["y"], axis=0)
    tensors = [tiny_onnx.tensor(name, "FP32", (tiny_onnx.BATCH, 1)) for name in "xy"]
    tiny_onnx.write(path, [node], tensors[:1], tensors[1:], {"first": np.array([True])})
    async with running(path) as subject:
        assert subject.engine.signature.batched
        async with asyncio.TaskGroup() as tasks:
            async with subject.busy(tasks, subject.ask(rows(0))):
                others = [tasks.create_task(subject.ask(rows(number))) for number in (1, 2)]
                await subject.until(lambda: subject.engine.open_requests == 3)
            assert [await each for each in others] == [rows(1), rows(2)]


@pytest.mark.parametrize("make", [tiny_onnx.truncated, tiny_onnx.unknown_operator, tiny_onnx.custom_domain])
async def test_a_bad_file_does_not_load(path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(ModelFileError):
        async with running(make(path)):
            pass


async def test_a_thread_that_dies_ends_every_request_with_an_error(path: Path, caplog: Any) -> None:
    async with running(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:

        def break_down(*_: object) -> Any:
            raise ZeroDivisionError("a mistake of ours")

        subject.engine._worker.session.run = break_down  # type: ignore[assignment]
        async with subject.busy(tasks, failing(subject.ask(rows(0)))) as first:
            second = tasks.create_task(failing(subject.ask(rows(1))))
            await subject.until(lambda: subject.engine.open_requests == 2)
        for task in (first, second):
            error = await task
            assert (type(error), error.code) == (EngineError, "engine_died")
        assert (await subject.engine.ended) is not None
        assert subject.engine.heartbeat_age_s == math.inf
        assert (await failing(subject.ask(rows(1)))).code == "engine_died"
    assert "a mistake of ours" in caplog.text


async def test_closing_ends_what_is_open_with_an_error(path: Path) -> None:
    async with running(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        async with subject.busy(tasks, subject.ask(rows(0))) as first:
            second = tasks.create_task(failing(subject.ask(rows(1))))
            await subject.until(lambda: subject.engine.open_requests == 2)
            subject.engine._worker.stop()
            subject.engine._worker.put(Submit(Job(numbers(1.0), Doubling(), Priority.DEFAULT, 0.0, math.inf, answer)))
        assert (await second).code == "model_unloaded"
        assert await first == rows(0)
        assert await subject.engine.ended is None


async def test_a_request_that_comes_while_the_thread_ends_is_answered_too(path: Path) -> None:
    async with running(tiny_onnx.identity(path)) as subject:
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        late = Job(numbers(1.0), Doubling(), Priority.DEFAULT, 0.0, math.inf, answer)
        subject.engine._open.add(late)  # and the thread never heard of it
        await subject.engine.close()
        assert (await failing(answer)).code == "model_unloaded"
        subject.engine._expire(late, 1.0)
        assert subject.engine.statistics.fail.count == 1


def test_a_loop_that_has_closed_needs_no_answer() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    engine_module._post(loop, print, None)


async def test_an_engine_that_hangs_is_not_waited_for_without_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "STOP_TIMEOUT_S", 0.01)
    async with running(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        async with subject.busy(tasks, subject.ask(rows(0))):
            with pytest.raises(EngineError, match=r"did not stop within 0\.01 s"):
                await subject.engine.close()
        monkeypatch.undo()


async def test_a_load_that_is_cancelled_leaves_no_thread(path: Path) -> None:
    tiny_onnx.identity(path)
    cpu = CpuBudget(1)
    series = Metrics().for_tensors("tiny:1")
    with cpu.turn(1):
        load = asyncio.ensure_future(OnnxEngine.load("tiny:1", path, SessionConfig(), series, cpu))
        async with asyncio.timeout(DEADLINE_S):
            while not cpu.waiting:  # noqa: ASYNC110
                await asyncio.sleep(0)
        load.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await load


async def test_sizes_of_batches_that_clients_choose_do_not_fill_the_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MOST_BATCH_SIZES", 3)
    async with running(tiny_onnx.identity(path)) as subject:
        for size in range(1, 6):
            await subject.ask(rows(*range(size)))
        assert subject.engine.statistics.batches.keys() == {1, 2, 3}
        assert subject.engine.statistics.execution_count == 5


# Neighbours


async def test_two_sessions_do_not_mix(path: Path, tmp_path: Path) -> None:
    cpu = CpuBudget(2)
    async with (
        running(tiny_onnx.identity(path), cpu, threads=2) as first,
        running(tiny_onnx.fixed(tmp_path / "other.onnx"), cpu, threads=2) as second,
    ):
        results = await asyncio.gather(
            *(first.ask([[number]]) for number in range(20)), *(second.ask([[number] * 4]) for number in range(20))
        )
        assert results == [[[number]] for number in range(20)] + [[[2 * number] * 4] for number in range(20)]
        assert cpu.free == 2


@contextmanager
def recorded(cpu: CpuBudget) -> Iterator[list[int]]:
    """Note how many cores are lent whenever a turn begins."""
    lent: list[int] = []
    take = cpu._take

    def noting(turn: Any) -> None:
        take(turn)
        lent.append(cpu._threads - cpu.free)

    cpu._take = noting  # type: ignore[method-assign]
    yield lent


async def test_text_embeddings_and_tensors_take_turns_on_the_cpu(
    path: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    from tests.tiny_gguf import write_tiny_bert

    cpu = CpuBudget(1)
    metrics = Metrics()
    llama = await LlamaEngine.load("text:1", tiny_model_path, LLAMA_CONFIG, metrics.for_model("text:1"), cpu)
    text = EngineUnderTest(llama, metrics)
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    try:
        async with (
            running(tiny_onnx.slow(path, rounds=20), cpu) as tensors,
            embedding(write_tiny_bert(tmp_path / "bert.gguf"), cpu=cpu) as embedder,
        ):
            with recorded(cpu) as lent:
                async with asyncio.timeout(DEADLINE_S):
                    await asyncio.gather(
                        text.ask("Hello", sampling),
                        *(tensors.ask([[0.0] * 256]) for _ in range(30)),
                        *(embedder.vectors(["the quick brown fox"]) for _ in range(8)),
                    )
            assert set(lent) == {1}
            assert cpu.free == 1
    finally:
        await llama.close()
