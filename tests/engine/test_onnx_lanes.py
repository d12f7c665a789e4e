"""Several evaluations of one session at once, on real onnxruntime: who shares what, and what one's failure does not do.

Where a test needs the lanes to be busy it takes the CPU budget itself: each stands before its evaluation then.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.core.errors import DeadlineExceededError, EngineError
from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.onnx import worker as worker_module
from appliance.engine.onnx.worker import Lane
from tests import tiny_onnx
from tests.engine.test_onnx_engine import Doubling, Subject, failing, numbers, rows, running

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def two_lanes(path: Path, **changes: Any) -> AsyncIterator[Subject]:
    async with running(path, CpuBudget(2), threads=2, lanes=2, **changes) as subject:
        yield subject


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


async def test_two_batches_are_evaluated_at_once_with_a_thread_each(path: Path) -> None:
    async with two_lanes(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        with subject.cpu.turn(2):
            both = [tasks.create_task(subject.ask(rows(number))) for number in range(2)]
            await subject.until(lambda: subject.cpu.waiting == 2)
            assert subject.engine._worker.running == 2
        assert [await each for each in both] == [rows(0), rows(1)]
        await subject.until(lambda: subject.engine._worker.running == 0)
        assert subject.engine.statistics.batches.keys() == {1}
        assert subject.engine._worker.session._session.get_session_options().intra_op_num_threads == 1
        assert subject.engine.properties["lanes"] == "2"


async def test_what_waits_is_shared_out_evenly(path: Path) -> None:
    async with two_lanes(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        with subject.cpu.turn(2):
            for number in range(2):
                tasks.create_task(subject.ask(rows(number)))
                await subject.until(lambda number=number: subject.cpu.waiting == number + 1)  # type: ignore[misc]
            others = [tasks.create_task(subject.ask(rows(number))) for number in range(8)]
            await subject.until(lambda: subject.engine.open_requests == 10)
        assert [await each for each in others] == [rows(number) for number in range(8)]
        assert max(subject.engine.statistics.batches) == 4


async def test_a_lone_job_of_many_items_is_evaluated_by_all_lanes_and_answered_in_order(path: Path) -> None:
    async with two_lanes(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        with subject.cpu.turn(2):
            job = tasks.create_task(subject.engine.submit(numbers(*range(10)), Doubling()))
            await subject.until(lambda: subject.cpu.waiting == 2)
        assert await job == list(range(10))
        assert subject.engine.statistics.batches.keys() == {5}
        assert (subject.engine.statistics.success.count, subject.engine.statistics.inference_count) == (1, 10)


async def test_a_large_job_does_not_hold_up_a_small_one(path: Path) -> None:
    async with two_lanes(tiny_onnx.identity(path), batch_rows=4) as subject, asyncio.TaskGroup() as tasks:
        collation = Doubling()
        with subject.cpu.turn(2):
            large = tasks.create_task(subject.engine.submit(numbers(*[1.0] * 2000), collation))
            await subject.until(lambda: subject.cpu.waiting == 2)
            small = tasks.create_task(subject.engine.submit(numbers(2.0), collation))
            await subject.until(lambda: subject.engine.open_requests == 2)
        executions = []
        small.add_done_callback(lambda _: executions.append(subject.engine.statistics.execution_count))
        assert await small == [2.0]
        assert await large == [1.0] * 2000
        assert executions[0] < 500


async def test_who_leaves_while_his_batch_runs_disturbs_neither_it_nor_the_other_lane(path: Path) -> None:
    async with two_lanes(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        with subject.cpu.turn(2):
            leaving, staying = (tasks.create_task(subject.ask(rows(number))) for number in range(2))
            await subject.until(lambda: subject.cpu.waiting == 2)
            leaving.cancel()
            await subject.until(lambda: subject.engine.open_requests == 1)
        assert await staying == rows(1)
        await subject.until(lambda: not subject.engine._worker._jobs)
        assert await subject.ask(rows(2)) == rows(2)
        assert subject.engine.statistics.cancel.count == 1


async def test_a_deadline_that_comes_while_a_job_is_in_both_lanes_ends_only_that_job(path: Path) -> None:
    async with two_lanes(tiny_onnx.identity(path), batch_rows=2) as subject, asyncio.TaskGroup() as tasks:
        collation = Doubling()
        with subject.cpu.turn(2):
            late = tasks.create_task(failing(subject.engine.submit(numbers(*range(9)), collation, deadline_s=0.5)))
            await subject.until(lambda: subject.cpu.waiting == 2)
            patient = tasks.create_task(subject.engine.submit(numbers(20.0), collation))
            assert isinstance(await late, DeadlineExceededError)
        assert await patient == [20.0]
        await subject.until(lambda: not subject.engine._worker._jobs)
        assert subject.engine.statistics.inference_count <= 5  # what was in the lanes, and the patient's


async def test_a_job_that_fails_in_one_lane_ends_once_whatever_the_other_makes_of_the_rest(path: Path) -> None:
    async with two_lanes(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        with subject.cpu.turn(2):
            mixed = [*numbers(*range(4)), *numbers("bad", 5.0, length=90)]
            bad = tasks.create_task(failing(subject.engine.submit(mixed, Doubling())))
            await subject.until(lambda: subject.cpu.waiting == 2)
        assert str(await bad) == "It cannot be joined."
        await subject.until(lambda: subject.engine._worker.running == 0)
        assert not subject.engine._worker._jobs
        assert (subject.engine.statistics.fail.count, subject.engine.statistics.success.count) == (1, 0)
        assert await subject.ask(rows(2)) == rows(2)


async def test_failures_of_both_lanes_open_the_circuit_and_a_trial_closes_it(path: Path) -> None:
    async with two_lanes(tiny_onnx.fallible(path), circuit_failures=2, circuit_open_s=0.02) as subject:
        with subject.cpu.turn(2):
            both = [asyncio.ensure_future(failing(subject.index(99))) for _ in range(2)]
            await subject.until(lambda: subject.cpu.waiting == 2)
        assert {(await each).code for each in both} == {"model_failed"}
        assert subject.engine.circuit_open
        await subject.until(lambda: not subject.engine.circuit_open)
        assert await subject.index(1) == [[[2.0, 3.0]]]


async def test_a_lane_that_dies_takes_the_session_with_it_and_nobody_waits_for_ever(path: Path, caplog: Any) -> None:
    async with two_lanes(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:

        def break_down(*_: object) -> Any:
            raise ZeroDivisionError("a mistake of ours")

        subject.engine._worker.session.run = break_down  # type: ignore[assignment]
        with subject.cpu.turn(2):
            open_ones = [tasks.create_task(failing(subject.ask(rows(number)))) for number in range(5)]
            await subject.until(lambda: subject.cpu.waiting == 2 and subject.engine.open_requests == 5)
        assert {(type(await each), (await each).code) for each in open_ones} == {(EngineError, "engine_died")}
        assert (await subject.engine.ended) is not None
        assert subject.engine.heartbeat_age_s == math.inf
    assert "a mistake of ours" in caplog.text


async def test_a_lane_that_hangs_is_seen_though_the_worker_goes_round(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "IDLE_BEAT_S", 0.001)
    async with two_lanes(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        worker = subject.engine._worker
        await subject.until(lambda: not worker.session.can_shrink)  # for which the worker itself takes a turn
        with subject.cpu.turn(2):
            tasks.create_task(subject.ask(rows(0)))
            await subject.until(lambda: subject.cpu.waiting == 1)
            (began,) = (each.beat_at for each in worker._lanes if each.jobs)
            await subject.until(lambda: worker._beat_at > began + 0.01)
            assert worker.beat_at == began
        await subject.until(lambda: worker.beat_at > began)


async def test_closing_answers_what_the_lanes_evaluate_and_ends_the_rest_with_an_error(path: Path) -> None:
    async with two_lanes(tiny_onnx.identity(path)) as subject, asyncio.TaskGroup() as tasks:
        with subject.cpu.turn(2):
            evaluated = []
            for number in range(2):
                evaluated.append(tasks.create_task(subject.ask(rows(number))))
                await subject.until(lambda number=number: subject.cpu.waiting == number + 1)  # type: ignore[misc]
            waiting = tasks.create_task(failing(subject.ask(rows(2))))
            await subject.until(lambda: subject.engine.open_requests == 3)
            subject.engine._worker.stop()
        assert [await each for each in evaluated] == [rows(0), rows(1)]
        assert (await waiting).code == "model_unloaded"
        assert await subject.engine.ended is None
        assert not any(each._thread.is_alive() for each in subject.engine._worker._lanes)


async def test_lanes_at_rest_give_memory_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "IDLE_BEAT_S", 0.01)
    async with two_lanes(tiny_onnx.identity(path, "FP32")) as subject:
        await asyncio.gather(*(subject.ask([[1.0, 2.0, 3.0]]) for _ in range(4)))
        await subject.until(lambda: not subject.engine._worker.session.can_shrink)
        assert await subject.ask([[1.0, 2.0, 3.0]]) == [[1.0, 2.0, 3.0]]


async def test_many_callers_in_four_lanes_each_get_their_own_rows(path: Path) -> None:
    async with running(tiny_onnx.identity(path), CpuBudget(2), threads=4, lanes=4, queue_size=500) as subject:
        answers = await asyncio.gather(*(subject.ask(rows(*range(number, number + 3))) for number in range(300)))
        assert answers == [rows(*range(number, number + 3)) for number in range(300)]
        assert subject.engine.statistics.inference_count == 900
        assert subject.cpu.free == 2


async def test_a_model_with_one_lane_is_evaluated_by_the_worker_itself(path: Path) -> None:
    async with running(tiny_onnx.identity(path), CpuBudget(2), threads=2) as subject:
        assert await subject.ask(rows(1)) == rows(1)
        assert subject.engine._worker._lanes == []
        assert subject.engine._worker.session._session.get_session_options().intra_op_num_threads == 2


def test_a_lane_at_rest_keeps_nothing_of_its_last_batch() -> None:
    import gc
    import queue
    import weakref

    class Batch(list[Any]):
        pass

    class Evaluator:
        def evaluate(self, pieces: Any, _: Any) -> Any:
            return [weakref.ref(pieces)]

    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    lane = Lane("tiny", Evaluator(), done.put)  # type: ignore[arg-type]
    lane.put(Batch())
    (batch,) = done.get(timeout=10).evaluated
    lane.put(Batch())
    done.get(timeout=10)  # so it is through with the first
    gc.collect()
    assert batch() is None
    lane.stop()
    lane.join()


# Outputs


async def test_outputs_that_nobody_wants_are_not_fetched(path: Path) -> None:
    async with running(tiny_onnx.two_inputs(path)) as subject:
        session, seen = subject.engine._worker.session, []
        run = session.run

        def watching(*given: Any) -> Any:
            seen.append(list(outputs := run(*given)))
            return outputs

        session.run = watching  # type: ignore[assignment]
        given = {"a": np.full((1, 2), 3, np.float32), "b": np.full((1, 2), 1, np.float32)}
        await subject.engine.infer(given, ("difference",))
        await subject.engine.infer(given)
        assert seen == [["difference"], ["sum", "difference"]]


async def test_callers_that_share_a_batch_get_each_the_outputs_they_want(path: Path) -> None:
    async with running(tiny_onnx.two_inputs(path)) as subject, asyncio.TaskGroup() as tasks:
        given = {"a": np.full((1, 2), 3, np.float32), "b": np.full((1, 2), 1, np.float32)}
        async with subject.busy(tasks, subject.engine.infer(given)):
            wishes = (("sum",), ("difference",), (), ("difference",))
            others = [tasks.create_task(subject.engine.infer(given, wish)) for wish in wishes]
            await subject.until(lambda: subject.engine.open_requests == 5)
        assert [list(await each) for each in others] == [["sum"], ["difference"], ["sum", "difference"], ["difference"]]
        assert subject.engine.statistics.batches.keys() == {1, 4}
