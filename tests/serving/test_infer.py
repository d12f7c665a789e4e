"""Requests with tensors: names, versions, outputs, deadlines, and what is told of the models."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from appliance.core.errors import (
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from appliance.core.tensors import Datatype, ModelState, Tensor, TensorRequest, TensorResult
from appliance.core.types import GenerationRequest, SamplingParams
from appliance.serving.floor import ServingFloor
from tests import tiny_onnx
from tests.serving.conftest import DEADLINE_S, Box, serving, text_of
from tests.serving.test_tensor_models import features, slow, task, until_busy

pytestmark = pytest.mark.anyio


@pytest.fixture
def pair_box(box: Box) -> Box:
    """Return a box with `pair`, which has two inputs and two outputs."""
    box.add_tensors("pair", tiny_onnx.two_inputs)
    return box


def fp32(name: str, *values: float) -> Tensor:
    return Tensor(name, Datatype.FP32, np.array([values], np.float32))


def pair(*outputs: str, **more: Any) -> TensorRequest:
    return TensorRequest("pair", "", [fp32("a", 5, 6), fp32("b", 1, 2)], outputs, **more)


def table(result: TensorResult) -> list[tuple[str, str, list[Any]]]:
    return [(each.name, each.datatype, each.array.tolist()) for each in result.outputs]


async def test_outputs_come_in_the_order_that_was_asked_for_or_else_in_the_models(pair_box: Box) -> None:
    total, difference = ("sum", "FP32", [[6, 8]]), ("difference", "FP32", [[4, 4]])
    async with serving(pair_box) as floor:
        assert table(await floor.tensors.infer(pair())) == [total, difference]
        assert table(await floor.tensors.infer(pair("difference", "sum"))) == [difference, total]
        assert table(await floor.tensors.infer(pair("difference"))) == [difference]


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([fp32("a", 1), fp32("b", 1), fp32("a", 2)], (), "'a' is named twice among the inputs"),
        ([fp32("a", 1), fp32("b", 1)], ("sum", "sum"), "'sum' is named twice among the outputs"),
        ([fp32("a", 1)], (), "b"),
        ([fp32("a", 1), fp32("b", 1), fp32("c", 1)], (), "c"),
        ([fp32("a", 1), fp32("b", 1)], ("product",), "product"),
        ([fp32("a", 1), Tensor("b", Datatype.INT64, np.ones((1, 1), np.int64))], (), "b"),
        ([fp32("a", 1), Tensor("b", Datatype.FP32, np.ones(1, np.float32))], (), "b"),
    ],
)
async def test_tensors_that_do_not_fit_are_refused_by_name(
    pair_box: Box, inputs: list[Tensor], outputs: tuple[str, ...], message: str
) -> None:
    async with serving(pair_box) as floor:
        with pytest.raises(InvalidRequestError, match=message):
            await floor.tensors.infer(TensorRequest("pair", "", inputs, outputs))
        assert table(await floor.tensors.infer(pair("sum"))) == [("sum", "FP32", [[6, 8]])]


async def test_strings_go_in_and_out_as_bytes(box: Box) -> None:
    box.add_tensors("strings", tiny_onnx.strings)
    async with serving(box) as floor:
        text = np.array([["pump", "泵".encode()]], object)
        text[0, 0] = b"pump"
        [twice] = (
            await floor.tensors.infer(TensorRequest("strings", "", [Tensor("text", Datatype.BYTES, text)]))
        ).outputs
        assert twice.datatype is Datatype.BYTES
        assert twice.array.tolist() == [[b"pumppump", "泵泵".encode()]]


async def test_a_version_answers_by_its_number_and_the_last_one_without(box: Box) -> None:
    box.add_tensors("table")
    box.add_tensors("table", seed=1)
    async with serving(box) as floor:
        answers = {}
        for version in ("1", "2", ""):
            request = TensorRequest("table", version, features().inputs)
            told = await floor.tensors.infer(request)
            answers[version] = (told.version, told.outputs[0].array.tolist())
        assert [version for version, _ in answers.values()] == ["1", "2", "2"]
        assert answers["1"][1] != answers["2"][1] == answers[""][1]
        with pytest.raises(NotFoundError, match=r"table has no version '3'; it has: 1, 2\.") as refusal:
            await floor.tensors.infer(TensorRequest("table", "3", features().inputs))
        assert refusal.value.code == "model_not_found"
        card = floor.tensors.card("table", "1")
        assert (card.name, card.version, card.versions) == ("table", "1", ("1", "2"))


async def test_a_name_that_is_not_known_is_told_the_names_that_are(pair_box: Box) -> None:
    async with serving(pair_box) as floor:
        for call in (floor.tensors.card, floor.tensors.is_ready, floor.tensors.statistics):
            with pytest.raises(NotFoundError, match=r"no tensor model 'nobody'; there are: pair\."):
                call("nobody")
        for work in (floor.tensors.load("nobody"), floor.tensors.unload("nobody")):
            with pytest.raises(NotFoundError, match="nobody"):
                await work


async def test_a_model_for_text_is_none_of_tensors(box: Box) -> None:
    async with serving(box) as floor:
        assert floor.tensors.index() == []
        with pytest.raises(NotFoundError, match="tiny takes no tensors: it is a GGUF model") as refusal:
            await floor.tensors.infer(features("tiny"))
        assert "/v1" in refusal.value.advice
        with pytest.raises(NotFoundError, match="there is none yet"):
            floor.tensors.card("nobody")


async def test_a_model_of_tensors_writes_no_text_and_embeds_nothing(pair_box: Box) -> None:
    async with serving(pair_box) as floor:
        with pytest.raises(InvalidRequestError, match="pair:1 is for tensors, and writes no text") as refusal:
            await floor.text.generate(GenerationRequest("pair", "the", SamplingParams()))
        assert "/v2" in refusal.value.advice
        card = next(each for each in floor.text.cards() if each.name == "pair")
        assert (card.kind, card.task, card.loaded) == ("onnx", "tensor", False)
        await floor.tensors.load("pair")
        assert next(each for each in floor.text.cards() if each.name == "pair").loaded
        assert await text_of(await floor.text.generate(GenerationRequest("tiny", "the", SamplingParams(max_tokens=2))))
    async with serving(pair_box, model="pair") as floor:
        async with asyncio.timeout(DEADLINE_S):
            while not floor.models.attempted:  # noqa: ASYNC110  (a state without an event)
                await asyncio.sleep(0.001)
        assert "writes no text" in floor.models.health().reason


async def test_the_card_tells_the_signature_at_once_and_the_providers_when_loaded(pair_box: Box) -> None:
    async with serving(pair_box) as floor:
        card = floor.tensors.card("pair")
        assert [each.name for each in card.signature.inputs] == ["a", "b"]
        assert [each.name for each in card.signature.outputs] == ["sum", "difference"]
        assert card.signature.batched
        assert (card.platform, card.properties) == ("onnxruntime_onnx", {})
        assert not floor.tensors.is_ready("pair")
        await floor.tensors.load("pair")
        assert floor.tensors.is_ready("pair")
        loaded = floor.tensors.card("pair")
        assert loaded.signature == card.signature
        assert "CPUExecutionProvider" in " ".join(loaded.properties.values())


async def test_the_index_has_every_version_and_its_state(pair_box: Box) -> None:
    pair_box.add_tensors("pair", tiny_onnx.identity)
    pair_box.add_tensors("table")
    async with serving(pair_box) as floor:
        await floor.tensors.load("pair")
        assert floor.tensors.index() == [
            ModelState("pair", "1", "UNAVAILABLE", "not loaded"),
            ModelState("pair", "2", "READY"),
            ModelState("table", "1", "UNAVAILABLE", "not loaded"),
        ]
        await floor.tensors.infer(TensorRequest("pair", "1", pair().inputs))
        await floor.tensors.unload("pair")
        assert {each.state for each in floor.tensors.index()} == {"UNAVAILABLE"}


async def test_statistics_are_those_of_what_is_loaded(pair_box: Box) -> None:
    pair_box.add_tensors("table")
    async with serving(pair_box) as floor:
        assert floor.tensors.statistics() == []
        await floor.tensors.infer(pair())
        await floor.tensors.infer(features(rows=3))
        [of_pair, of_table] = floor.tensors.statistics()
        assert (of_pair.name, of_pair.version, of_pair.success.count) == ("pair", "1", 1)
        assert (of_table.inference_count, of_table.execution_count) == (3, 1)
        assert floor.tensors.statistics("table") == floor.tensors.statistics("table", "1") == [of_table]
        await floor.tensors.unload("table")
        assert floor.tensors.statistics("table") == []


async def test_a_deadline_ends_the_work_and_the_settings_bound_it(box: Box) -> None:
    box.add_tensors("slow", tiny_onnx.slow, rounds=3000)
    async with serving(box) as floor:
        await floor.tensors.load("slow")
        with pytest.raises(DeadlineExceededError):
            await floor.tensors.infer(TensorRequest("slow", "", slow(rows=64).inputs, deadline_s=0.01))
        assert opened(floor, "slow:1") == 0
    async with serving(box, request_timeout_s=0.01) as floor:
        with pytest.raises(DeadlineExceededError):
            await floor.tensors.infer(TensorRequest("slow", "", slow(rows=64).inputs, deadline_s=60))


async def test_a_load_longer_than_a_request_may_take_goes_on(box: Box) -> None:
    box.add_tensors("table")
    async with serving(box, request_timeout_s=0.01) as floor:
        load, go = floor.tensor_models._loader.load, asyncio.Event()

        async def held_up(registered: Any) -> Any:
            await go.wait()
            return await load(registered)

        floor.tensor_models._loader.load = held_up  # type: ignore[method-assign]
        with pytest.raises(DeadlineExceededError, match="it goes on loading"):
            await floor.tensors.load("table")
        with pytest.raises(DeadlineExceededError, match="had not answered"):
            await floor.tensors.infer(features())
        assert floor.tensors.index() == [ModelState("table", "1", "LOADING")]
        go.set()
        async with asyncio.timeout(DEADLINE_S):
            while not floor.tensors.is_ready("table"):  # noqa: ASYNC110  (a state without an event)
                await asyncio.sleep(0.001)


async def test_one_who_leaves_disturbs_nobody(box: Box) -> None:
    box.add_tensors("slow", tiny_onnx.slow)
    async with serving(box) as floor:
        first = task(floor.tensors.infer(slow()))
        await until_busy(floor, "slow:1")
        others = [task(floor.tensors.infer(slow())) for _ in range(4)]
        await asyncio.sleep(0)
        others[0].cancel()
        first.cancel()
        assert all(each.outputs for each in await asyncio.gather(*others[1:]))
        assert opened(floor, "slow:1") == 0


async def test_a_full_queue_refuses_one_more(box: Box) -> None:
    box.add_tensors("slow", tiny_onnx.slow, rounds=1000)
    async with serving(box, queue_size=0) as floor:
        running = task(floor.tensors.infer(slow(rows=64)))
        await until_busy(floor, "slow:1")
        with pytest.raises(OverloadedError) as refusal:
            await floor.tensors.infer(slow())
        assert refusal.value.retry_after_s
        assert (await running).outputs


async def test_a_model_that_fails_is_left_alone_for_a_while_and_the_others_serve(box: Box) -> None:
    box.add_tensors("fallible", tiny_onnx.fallible)
    box.add_tensors("table")

    def index(number: int) -> TensorRequest:
        return TensorRequest("fallible", "", [Tensor("index", Datatype.INT64, np.full((1, 1), number))])

    async with serving(box, circuit_failures=2, circuit_open_s=0.2) as floor:
        for _ in range(2):
            with pytest.raises(EngineError):
                await floor.tensors.infer(index(99))
        with pytest.raises(UnavailableError) as refusal:
            await floor.tensors.infer(index(0))
        assert refusal.value.code == "circuit_open"
        assert not floor.tensors.is_ready("fallible")
        assert floor.tensors.index()[0] == ModelState("fallible", "1", "UNAVAILABLE", "It failed too often of late.")
        assert (await floor.tensors.infer(features())).outputs
        assert floor.readiness.health().ready
        async with asyncio.timeout(DEADLINE_S):
            while not floor.tensors.is_ready("fallible"):  # noqa: ASYNC110  (time passes)
                await asyncio.sleep(0.01)
        assert (await floor.tensors.infer(index(0))).outputs


def opened(floor: ServingFloor, name: str) -> int:
    model = floor.tensor_models.find(name)
    assert model is not None
    assert model.leases == 0
    return model.engine.open_requests
