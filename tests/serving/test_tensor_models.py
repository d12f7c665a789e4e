"""ONNX models: loaded once by whoever asks first, shared, unloaded when idle or told to, buried when they die."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from appliance.core.errors import (
    ConflictError,
    EngineError,
    ModelFileError,
    NotFoundError,
    UnavailableError,
)
from appliance.core.tensors import Datatype, Tensor, TensorRequest, TensorResult
from appliance.core.types import EmbeddingRequest, GenerationRequest, SamplingParams
from appliance.observe.resources import memory
from appliance.serving import embedders, loaded, tensor_models
from appliance.serving.floor import ServingFloor
from appliance.serving.readiness import Readiness
from tests import tiny_onnx
from tests.serving.conftest import DEADLINE_S, Box, serving, text_of

pytestmark = pytest.mark.anyio

FEATURES = np.ones((1, tiny_onnx.TABULAR_FEATURES), np.float32)


@pytest.fixture
def tensor_box(box: Box) -> Box:
    box.add_tensors("table")
    return box


def features(model: str = "table", rows: int = 1, **more: Any) -> TensorRequest:
    return TensorRequest(model, "", [Tensor("features", Datatype.FP32, FEATURES.repeat(rows, axis=0))], **more)


def slow(model: str = "slow", rows: int = 8) -> TensorRequest:
    return TensorRequest(model, "", [Tensor("x", Datatype.FP32, np.ones((rows, 256), np.float32))])


def task(work: Coroutine[Any, Any, TensorResult | None]) -> asyncio.Task[Any]:
    return asyncio.ensure_future(work)


async def until_busy(floor: ServingFloor, name: str) -> None:
    """Wait until a request is being evaluated."""
    async with asyncio.timeout(DEADLINE_S):
        while (model := floor.tensor_models.find(name)) is None or not model.engine.open_requests:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def until_loading(floor: ServingFloor, name: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while floor.tensor_models.state(name)[0] != "LOADING":  # noqa: ASYNC110  (a state without an event)
            await asyncio.sleep(0)


def count_loads(floor: ServingFloor) -> list[str]:
    """Note what is loaded from now on."""
    noted: list[str] = []
    load = floor.tensor_models._loader.load

    async def noting(registered: Any) -> Any:
        noted.append(registered.full_name)
        return await load(registered)

    floor.tensor_models._loader.load = noting  # type: ignore[method-assign]
    return noted


async def test_the_first_request_loads_a_model_and_the_others_share_it(tensor_box: Box) -> None:
    async with serving(tensor_box) as floor:
        loads = count_loads(floor)
        told: list[TensorResult] = await asyncio.gather(*(floor.tensors.infer(features()) for _ in range(5)))
        assert loads == ["table:1"]
        assert {(each.model, each.version) for each in told} == {("table", "1")}
        assert all(each.outputs[0].array.sum() == pytest.approx(1) for each in told)
        assert floor.tensor_models.names == {"table:1"}
        assert floor.models.names == floor.embedders.names == frozenset()


async def test_a_load_goes_on_when_the_one_who_began_it_leaves(tensor_box: Box) -> None:
    async with serving(tensor_box) as floor:
        loads = count_loads(floor)
        first, second = task(floor.tensors.infer(features())), task(floor.tensors.infer(features()))
        await until_loading(floor, "table:1")
        first.cancel()
        assert (await second).model == "table"
        with pytest.raises(asyncio.CancelledError):
            await first
        assert loads == ["table:1"]
        model = floor.tensor_models.find("table:1")
        assert model is not None
        assert model.leases == 0


async def test_a_load_that_nobody_waits_for_any_more_ends_and_can_be_unloaded(tensor_box: Box) -> None:
    async with serving(tensor_box) as floor:
        only = task(floor.tensors.infer(features()))
        await until_loading(floor, "table:1")
        only.cancel()
        await floor.tensors.unload("table")
        assert floor.tensor_models.names == frozenset()
        assert (await floor.tensors.infer(features())).outputs


async def test_one_who_leaves_just_when_it_is_loaded_keeps_no_lease(tensor_box: Box) -> None:
    async with serving(tensor_box) as floor:
        waiting = task(floor.tensors.infer(features()))
        await until_loading(floor, "table:1")
        floor.tensor_models._loads["table:1"].done.add_done_callback(lambda _: waiting.cancel())
        with pytest.raises(asyncio.CancelledError):
            await waiting
        model = floor.tensor_models.find("table:1")
        assert model is not None
        assert model.leases == 0


async def test_models_load_beside_each_other(tensor_box: Box) -> None:
    tensor_box.add_tensors("other", seed=1)
    async with serving(tensor_box) as floor:
        load = floor.tensor_models._loader.load
        both = asyncio.Barrier(2)

        async def together(registered: Any) -> Any:
            await both.wait()
            return await load(registered)

        floor.tensor_models._loader.load = together  # type: ignore[method-assign]
        await asyncio.gather(floor.tensors.infer(features()), floor.tensors.infer(features("other")))
        assert floor.tensor_models.names == {"table:1", "other:1"}


async def test_an_idle_model_makes_room_for_another_and_a_busy_one_does_not(tensor_box: Box) -> None:
    tensor_box.add_tensors("slow", tiny_onnx.slow, rounds=2000)
    async with serving(tensor_box, max_loaded_tensor_models=1) as floor:
        await floor.tensors.infer(features())
        busy = task(floor.tensors.infer(slow(rows=64)))
        await until_busy(floor, "slow:1")
        assert floor.tensor_models.names == {"slow:1"}
        with pytest.raises(UnavailableError, match="slow:1 are busy") as refusal:
            await floor.tensors.infer(features())
        assert refusal.value.retry_after_s
        assert "slow:1 are busy" in floor.tensor_models.state("table:1")[1]
        assert (await busy).outputs
        assert (await floor.tensors.infer(features())).outputs


async def test_a_model_larger_than_the_memory_is_refused_with_both_figures(
    tensor_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce = replace(memory(), available=2**10)
    monkeypatch.setattr(tensor_models, "memory", lambda: scarce)
    async with serving(tensor_box) as floor:
        with pytest.raises(UnavailableError, match=r"needs \d+ MiB of memory; 0 MiB are free") as refusal:
            await floor.tensors.infer(features())
        assert refusal.value.code == "not_enough_memory"


async def test_memory_that_a_load_has_spoken_for_is_not_given_twice(
    tensor_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor_box.add_tensors("other", seed=1)
    needed = tensor_box.registry.resolve("table").minimum_memory
    monkeypatch.setattr(tensor_models, "memory", lambda: replace(memory(), available=int(1.5 * needed)))
    async with serving(tensor_box) as floor:
        load, go = floor.tensor_models._loader.load, asyncio.Event()

        async def held_up(registered: Any) -> Any:
            await go.wait()
            return await load(registered)

        floor.tensor_models._loader.load = held_up  # type: ignore[method-assign]
        first = task(floor.tensors.infer(features()))
        await until_loading(floor, "table:1")
        with pytest.raises(UnavailableError, match="needs"):
            await floor.tensors.infer(features("other"))
        go.set()
        assert (await first).outputs


async def test_idle_models_of_one_kind_give_their_memory_to_another(
    tensor_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor_box.add_encoder("encoder")
    ample, scarce = memory(), replace(memory(), available=2**10)
    async with serving(tensor_box) as floor:
        await floor.tensors.infer(features())
        monkeypatch.setattr(embedders, "memory", lambda: scarce if floor.tensor_models.names else ample)
        assert (await floor.embedding.embed(EmbeddingRequest("encoder", ["the dog"]))).vectors
        assert floor.tensor_models.names == frozenset()
        monkeypatch.setattr(tensor_models, "memory", lambda: scarce if floor.embedders.names else ample)
        await floor.tensors.infer(features())
        assert floor.embedders.names == frozenset()
        monkeypatch.setattr(loaded, "memory", lambda: scarce if floor.tensor_models.names else ample)
        assert await text_of(await floor.text.generate(GenerationRequest("tiny", "the", SamplingParams(max_tokens=2))))
        assert floor.tensor_models.names == frozenset()
        monkeypatch.setattr(tensor_models, "memory", lambda: scarce if floor.models.names else ample)
        await floor.tensors.infer(features())
        assert floor.models.names == frozenset()


async def test_the_model_of_the_settings_is_never_dropped_for_another_kind(
    tensor_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tensor_box, model="tiny") as floor:
        await text_of(await floor.text.generate(GenerationRequest("tiny", "the", SamplingParams(max_tokens=1))))
        monkeypatch.setattr(tensor_models, "memory", lambda: replace(memory(), available=0))
        with pytest.raises(UnavailableError, match="needs"):
            await floor.tensors.infer(features())
        assert floor.models.names == {"tiny:1"}


async def test_unloading_waits_for_what_runs_and_a_request_meanwhile_loads_afresh(tensor_box: Box) -> None:
    tensor_box.add_tensors("slow", tiny_onnx.slow, rounds=500)
    async with serving(tensor_box) as floor:
        loads = count_loads(floor)
        running = task(floor.tensors.infer(slow()))
        await until_busy(floor, "slow:1")
        unloading = task(floor.tensors.unload("slow"))
        async with asyncio.timeout(DEADLINE_S):
            while floor.tensor_models.state("slow:1")[0] != "UNLOADING":  # noqa: ASYNC110  (a state without an event)
                await asyncio.sleep(0)
        late = task(floor.tensors.infer(slow()))
        assert (await running).outputs
        await unloading
        assert (await late).outputs
        assert loads == ["slow:1", "slow:1"]
        await floor.tensors.unload("slow")
        await floor.tensors.unload("slow")
        assert floor.tensor_models.state("slow:1") == ("UNAVAILABLE", "not loaded")


async def test_a_loaded_model_cannot_be_removed_and_an_unloaded_one_can(tensor_box: Box) -> None:
    async with serving(tensor_box) as floor:
        await floor.tensors.infer(features())
        with pytest.raises(ConflictError):
            tensor_box.registry.remove("table")
        await floor.tensors.unload("table")
        tensor_box.registry.remove("table")
        with pytest.raises(NotFoundError, match="no tensor model 'table'"):
            await floor.tensors.infer(features())
        assert floor.tensors.index() == []


async def test_a_running_floor_sees_at_once_what_was_registered(tensor_box: Box) -> None:
    async with serving(tensor_box) as floor:
        assert (await floor.tensors.infer(features())).version == "1"
        tensor_box.add_tensors("table", seed=2)
        assert (await floor.tensors.infer(features())).version == "2"
        assert floor.tensor_models.names == {"table:1", "table:2"}


async def test_what_was_laid_out_for_a_removed_model_goes_with_the_next_load(tensor_box: Box) -> None:
    tensor_box.add_tensors("other", seed=1)
    async with serving(tensor_box) as floor:
        await floor.tensors.infer(features())
        await floor.tensors.unload("table")
        tensor_box.registry.remove("table")
        await floor.tensors.infer(features("other"))
        assert len([*tensor_box.settings.onnx_dir.iterdir()]) == 1


async def test_a_damaged_file_fails_its_own_request_and_leaves_the_others_alone(tensor_box: Box) -> None:
    tensor_box.add_tensors("broken", seed=3)
    path = tensor_box.registry.resolve("broken").files[0].path
    path.chmod(0o600)
    path.write_bytes(b"\xff" * path.stat().st_size)
    async with serving(tensor_box) as floor:
        await floor.tensors.infer(features())
        with pytest.raises(ModelFileError) as refusal:
            await floor.tensors.infer(features("broken"))
        assert floor.tensor_models.state("broken:1") == ("UNAVAILABLE", str(refusal.value))
        assert (await floor.tensors.infer(features())).outputs
        tensor_box.registry.remove("broken")


async def test_files_that_cannot_be_tidied_up_hold_up_no_load(
    tensor_box: Box, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from appliance.core.errors import StorageError
    from appliance.serving import tensor_loader

    def fail(*_: Any) -> None:
        raise StorageError("The disk failed.")

    monkeypatch.setattr(tensor_loader, "remove_stale_layouts", fail)
    async with serving(tensor_box) as floor:
        assert (await floor.tensors.infer(features())).outputs
    assert "files of removed models stay: The disk failed." in caplog.text


async def test_a_session_that_dies_rests_and_is_loaded_afresh_while_others_go_on(tensor_box: Box) -> None:
    tensor_box.add_tensors("other", seed=1)
    async with serving(tensor_box, circuit_open_s=0.2) as floor:
        await asyncio.gather(floor.tensors.infer(features()), floor.tensors.infer(features("other")))
        model = floor.tensor_models.find("table:1")
        assert model is not None
        model.engine._worker._batcher = None  # type: ignore[assignment]
        with pytest.raises(EngineError):
            await floor.tensors.infer(features())
        await model.gone.wait()
        with pytest.raises(UnavailableError, match="The session of table:1 ended") as refusal:
            await floor.tensors.infer(features())
        assert refusal.value.code == "circuit_open"
        assert refusal.value.retry_after_s
        assert "ended" in floor.tensor_models.state("table:1")[1]
        assert (await floor.tensors.infer(features("other"))).outputs
        assert Readiness(floor.tensor_models).health().ready
        async with asyncio.timeout(DEADLINE_S):
            while floor.tensor_models._rest("table:1"):  # noqa: ASYNC110  (time passes)
                await asyncio.sleep(0.01)
        assert (await floor.tensors.infer(features())).outputs


async def test_a_session_whose_thread_does_not_end_stays_until_its_stall_is_seen(
    tensor_box: Box, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tensor_box) as floor:
        await floor.tensors.infer(features())
        model = floor.tensor_models.find("table:1")
        assert model is not None
        close, tried = model.engine.close, asyncio.Event()

        async def hang() -> None:
            tried.set()
            raise EngineError("The session of table:1 did not stop within 30 s.")

        monkeypatch.setattr(model.engine, "close", hang)
        monkeypatch.setattr(tensor_models, "UNLOAD_WAIT_S", 0.01)
        assert not await floor.tensor_models.spare()
        await tried.wait()
        assert floor.tensor_models.state("table:1") == ("UNLOADING", "")
        await close()
        await model.gone.wait()
    assert "did not stop" in caplog.text


async def test_closing_ends_every_session_even_where_one_does_not_end(
    tensor_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor_box.add_tensors("other", seed=1)
    async with serving(tensor_box) as floor:
        await asyncio.gather(floor.tensors.infer(features()), floor.tensors.infer(features("other")))
        model, other = floor.tensor_models.find("table:1"), floor.tensor_models.find("other:1")
        assert model is not None
        assert other is not None
        close = model.engine.close

        async def hang() -> None:
            await close()
            raise EngineError("It did not stop.")

        monkeypatch.setattr(model.engine, "close", hang)
        with pytest.raises(EngineError, match="It did not stop"):
            await floor.tensor_models.close()
        assert other.engine.ended.done()
        assert floor.tensor_models.names == frozenset()


async def test_a_session_without_a_heartbeat_turns_readiness_red(tensor_box: Box) -> None:
    async with serving(tensor_box, stalled_engine_s=1e-9) as floor:
        await floor.tensors.infer(features())
        assert "session of table:1 does not answer" in floor.tensor_models.health().reason
        assert Readiness(floor.tensor_models).stalled == ["table:1"]


async def test_a_full_queue_turns_readiness_red_until_it_is_worked_off(tensor_box: Box) -> None:
    tensor_box.add_tensors("slow", tiny_onnx.slow)
    async with serving(tensor_box, queue_size=0) as floor:
        running = task(floor.tensors.infer(slow()))
        await until_busy(floor, "slow:1")
        assert "queue of slow:1 is full" in floor.readiness.health().reason
        await running
        assert floor.tensor_models.health().ready


async def test_draining_refuses_new_loads_and_goes_on_with_what_is_loaded(tensor_box: Box) -> None:
    tensor_box.add_tensors("other", seed=1)
    async with serving(tensor_box) as floor:
        await floor.tensors.infer(features())
        floor.drain()
        assert (await floor.tensors.infer(features())).outputs
        with pytest.raises(UnavailableError, match="stopping"):
            await floor.tensors.infer(features("other"))


async def test_the_end_answers_those_who_wait_for_a_load_and_those_who_are_evaluated(tensor_box: Box) -> None:
    tensor_box.add_tensors("slow", tiny_onnx.slow, rounds=2000)
    async with serving(tensor_box) as floor:

        async def stuck(_: Any) -> Any:
            await asyncio.Event().wait()

        running, queued = (task(floor.tensors.infer(slow(rows=64))) for _ in range(2))
        await until_busy(floor, "slow:1")
        floor.tensor_models._loader.load = stuck  # type: ignore[method-assign,assignment]
        waiting = task(floor.tensors.infer(features()))
        await until_loading(floor, "table:1")
        await floor.close()
        with pytest.raises(UnavailableError, match="stopping"):
            await waiting
        assert (await running).outputs
        with pytest.raises(EngineError, match="unloaded"):
            await queued


async def test_a_load_that_is_cancelled_answers_those_who_wait(tensor_box: Box) -> None:
    async with serving(tensor_box) as floor:

        async def stuck(_: Any) -> Any:
            raise asyncio.CancelledError

        floor.tensor_models._loader.load = stuck  # type: ignore[method-assign,assignment]
        with pytest.raises(UnavailableError, match="stopping"):
            await floor.tensors.infer(features())
