"""Embedders and models of tensors change versions as models for text do; trials are watched for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from appliance.core.errors import ConflictError, NotFoundError
from appliance.core.releases import Criteria
from appliance.core.tensors import Datatype, Tensor, TensorRequest
from appliance.core.types import EmbeddingRequest
from appliance.core.wishes import Soak
from appliance.serving import trials
from appliance.serving.floor import ServingFloor
from tests import tiny_onnx
from tests.serving.conftest import Box, serving

pytestmark = pytest.mark.anyio

LONG = Soak(seconds=10_000)


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110  (facts have no event; `serving` has the deadline)
        await asyncio.sleep(0.005)


async def embedded(floor: ServingFloor, model: str = "encoder") -> str:
    return (await floor.embedding.embed(EmbeddingRequest(model, ["the quick fox"]))).model


async def inferred(floor: ServingFloor) -> str:
    features = Tensor("features", Datatype.FP32, np.zeros((1, 4), np.float32))
    return (await floor.tensors.infer(TensorRequest("table", "", [features]))).version


def spoil(box: Box, full_name: str) -> None:
    path = box.registry.resolve(full_name).files[0].path
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def encoders(box: Box) -> Box:
    box.add_encoder("encoder")
    box.wishes.activate("encoder:1", origin="test", soak=None)
    box.add_encoder("encoder", seed=1)
    return box


@pytest.fixture
def tables(box: Box) -> Box:
    box.add_tensors("table", tiny_onnx.tabular)
    box.wishes.activate("table:1", origin="test", soak=None)
    box.add_tensors("table", tiny_onnx.tabular, seed=1)
    return box


async def test_an_embedder_is_switched_beside_running_requests_and_back(encoders: Box) -> None:
    async with serving(encoders) as floor:
        assert await embedded(floor) == "encoder:1"
        async with floor.embedders.lease("encoder:1"):
            await floor.versions.activate("encoder:2", origin="test", soak=LONG, criteria=Criteria())
            await until(lambda: floor.embedders.short_names.answering.get("encoder") == "encoder:2")
            assert await embedded(floor) == "encoder:2"
            assert await embedded(floor, "encoder:1") == "encoder:1"
        assert floor.embedders.names == {"encoder:1", "encoder:2"}
        await floor.versions.rollback("encoder", origin="test", reason="no good")
        await until(lambda: floor.embedders.short_names.answering.get("encoder") == "encoder:1")
        assert await embedded(floor) == "encoder:1"
        assert (await floor.versions.settled("encoder")).state == "rolled_back"
        await until(lambda: floor.embedders.names == {"encoder:1"})


async def test_an_embedder_that_cannot_be_loaded_costs_nobody_anything(encoders: Box) -> None:
    spoil(encoders, "encoder:2")
    encoders.wishes.activate("encoder:2", origin="test", soak=LONG)
    async with serving(encoders) as floor:
        answers = await asyncio.gather(*(embedded(floor) for _ in range(8)))
        assert set(answers) == {"encoder:1"}
        assert (await floor.versions.settled("encoder")).code == "not_loadable"


async def test_a_model_of_tensors_is_switched_beside_running_requests_and_back(tables: Box) -> None:
    async with serving(tables) as floor:
        assert await inferred(floor) == "1"
        async with floor.tensor_models.lease(tables.registry.resolve("table:1")):
            await floor.versions.activate("table:2", origin="test", soak=LONG, criteria=Criteria())
            await until(lambda: floor.tensor_models.short_names.answering.get("table") == "table:2")
            assert await inferred(floor) == "2"
        assert floor.tensor_models.names == {"table:1", "table:2"}
        await floor.versions.rollback("table", origin="test", reason="no good")
        await until(lambda: floor.tensor_models.short_names.answering.get("table") == "table:1")
        assert await inferred(floor) == "1"
        await until(lambda: floor.tensor_models.names == {"table:1"})


async def test_a_model_of_tensors_that_cannot_be_loaded_costs_nobody_anything(tables: Box) -> None:
    spoil(tables, "table:2")
    async with serving(tables) as floor:
        assert await inferred(floor) == "1"
        await floor.versions.activate("table:2", origin="test", soak=LONG, criteria=Criteria())
        answers = await asyncio.gather(*(inferred(floor) for _ in range(8)))
        assert set(answers) == {"1"}
        assert (await floor.versions.settled("table")).code == "not_loadable"


async def test_a_trial_that_nobody_asks_for_is_run_and_confirmed(tables: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "LOOK_S", 0.02)
    tables.wishes.activate("table:2", origin="test", soak=Soak(seconds=0.1))
    async with serving(tables) as floor:
        assert (await floor.versions.settled("table")).state == "confirmed"
        assert await inferred(floor) == "2"
        assert 'appliance_model_version_active{model="table",version="2"} 1.0' in floor.metrics.render().decode()


async def test_a_trial_with_failing_requests_is_rolled_back_and_counted(
    tables: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "LOOK_S", 0.02)
    async with serving(tables) as floor:
        await inferred(floor)
        await floor.versions.activate("table:2", origin="test", soak=LONG, criteria=Criteria())
        await until(lambda: floor.tensor_models.short_names.answering.get("table") == "table:2")
        loaded = floor.tensor_models.find("table:2")
        assert loaded is not None
        for _ in range(3):
            loaded.record.failed()
        wish = await floor.versions.settled("table")
        assert (wish.state, wish.code) == ("rolled_back", "soak_errors")
        assert await inferred(floor) == "1"
        await until(lambda: 'appliance_model_rollbacks_total{model="table"} 1.0' in floor.metrics.render().decode())


async def test_what_is_not_wished_for_has_no_end(tables: Box, tmp_path: Path) -> None:
    async with serving(tables) as floor:
        with pytest.raises(NotFoundError):
            await floor.versions.settled("nobody")
        await floor.versions.activate("table:2", origin="test", soak=LONG, criteria=Criteria())
        with pytest.raises(ConflictError):
            await floor.versions.activate("table:1", origin="test", soak=LONG, criteria=Criteria())
        assert [each.name for each in floor.versions.wishes()] == ["table"]
